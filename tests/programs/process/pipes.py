# A parent that sends numbers through a pipe, a child that logs them and answers through another. argv: data aux
import os, sys, time

data, aux = sys.argv[1:3]
down, up = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(down[1])
    os.close(up[0])
    log = open(data + "/log", "a")
    total = 0
    with os.fdopen(down[0]) as numbers:
        for number in iter(numbers.readline, ""):
            total += int(number)
            log.write("%s %d\n" % (number.strip(), total))
            log.flush()
            os.write(up[1], b"%d\n" % total)
    sys.exit(0)
os.close(down[0])
os.close(up[1])
answers = os.fdopen(up[0])
count = total = 0
open(aux + "/ready", "w").close()
while not os.path.exists(aux + "/stop"):
    count += 1
    total += count
    os.write(down[1], b"%d\n" % count)
    assert int(answers.readline()) == total
    time.sleep(0.001)
os.close(down[1])
assert os.wait()[1] == 0
