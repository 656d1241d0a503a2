# SQLite in the middle of work: a row for each number, and the sum in memory. argv: data aux
import os, sqlite3, sys, time

data, aux = sys.argv[1:3]
database = sqlite3.connect(data + "/database", isolation_level=None)
database.execute("create table if not exists numbers (number integer primary key, total integer)")
log = open(data + "/log", "a")
count = total = 0
open(aux + "/ready", "w").close()
while not os.path.exists(aux + "/stop"):
    count += 1
    total += count
    database.execute("begin immediate")
    database.execute("insert into numbers values (?, ?)", (count, total))
    log.write("%d %d\n" % (count, total))
    log.flush()
    database.execute("commit")
    if count % 20 == 0:
        assert database.execute("select count(*), max(total) from numbers").fetchone() == (count, total)
    time.sleep(0.001)
assert database.execute("pragma integrity_check").fetchone() == ("ok",)
assert database.execute("select count(*), max(total) from numbers").fetchone() == (count, total)
