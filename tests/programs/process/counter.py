# Counts in memory, in a log, in a file that is replaced, and in temporaries. argv: data aux
import os, sys, time

data, aux = sys.argv[1:3]
log = open(data + "/log", "a")
table = open(data + "/table", "w+b")
held = open(data + "/held", "w+")
os.unlink(data + "/held")
count = total = 0
open(aux + "/ready", "w").close()
while not os.path.exists(aux + "/stop"):
    count += 1
    total += count
    # What only memory and a file without a name know agrees with what the files say.
    held.seek(0)
    held.write("%020d" % count)
    held.flush()
    log.write("%d %d\n" % (count, total))
    log.flush()
    os.pwrite(table.fileno(), b"%08d" % count, 4096 * (count % 16))
    if count % 7 == 0:
        with open(data + "/state.new", "w") as state:
            state.write("%d %d\n" % (count, total))
        os.rename(data + "/state.new", data + "/state")
    if count % 11 == 0:
        with open(data + "/temporary", "w") as temporary:
            temporary.write("x" * 1000)
        os.unlink(data + "/temporary")
    held.seek(0)
    assert int(held.read()) == count
    time.sleep(0.001)
