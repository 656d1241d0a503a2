# Counts in memory and in a log, with a child that does nothing until `leave` is there. argv: data aux
import os, sys, time

data, aux = sys.argv[1:3]
child = os.fork()
if child == 0:
    while not os.path.exists(aux + "/leave") and not os.path.exists(aux + "/stop"):
        time.sleep(0.01)
    os._exit(0)
with open(aux + "/child", "w") as number:
    number.write("%d\n" % child)
log = open(data + "/log", "a")
count = total = 0
open(aux + "/ready", "w").close()
while not os.path.exists(aux + "/stop"):
    count += 1
    total += count
    log.write("%d %d\n" % (count, total))
    log.flush()
    if child and os.waitpid(child, os.WNOHANG)[0] == child:
        child = 0
        open(aux + "/left", "w").close()
    time.sleep(0.001)
