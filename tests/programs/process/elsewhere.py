# A counter that has files open elsewhere, and one without a name of 64 MiB. argv: data aux
import os, sys, time

data, aux = sys.argv[1:3]
log = open(data + "/log", "a")
other = open(aux + "/other", "w")
zero = open("/dev/zero", "w")
large = open(data + "/large", "wb")
os.unlink(data + "/large")
count = total = 0
open(aux + "/ready", "w").close()
while not os.path.exists(aux + "/stop"):
    count += 1
    total += count
    log.write("%d %d\n" % (count, total))
    log.flush()
    if os.path.exists(aux + "/fill") and not os.fstat(large.fileno()).st_size:
        large.write(b"x" * (64 << 20))
        large.flush()
    if os.path.exists(aux + "/empty"):
        large.truncate(0)
    time.sleep(0.001)
