# A program with a connection of TCP, which is not dumped, until it is told to be alone. argv: data aux
import os, socket, sys, time

data, aux = sys.argv[1:3]
listener = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listener.getsockname())
two = listener.accept()[0]
log = open(data + "/log", "a")
count = total = 0
open(aux + "/ready", "w").close()
while not os.path.exists(aux + "/stop"):
    count += 1
    total += count
    if one and os.path.exists(aux + "/alone"):
        for each in (one, two, listener):
            each.close()
        one = None
    if one:
        one.sendall(b"x")
        assert two.recv(1) == b"x"
    log.write("%d %d\n" % (count, total))
    log.flush()
    time.sleep(0.001)
