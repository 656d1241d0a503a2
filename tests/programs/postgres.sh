# initdb, pgbench and a client that is told of each commit, until told to stop.
# $1 data, $2 folder beside it. Starts as root, works as postgres.
set -eu
if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid postgres --regid "$(id -g postgres)" --clear-groups /bin/sh "$0" "$@"
fi
PATH="$PATH:$(ls -d /usr/lib/postgresql/*/bin | tail -1)"
export PGHOST="$2" PGUSER=postgres PGDATABASE=postgres HOME="$2"
cd "$1"
: > "$2/ready"
initdb -D pg -A trust -U postgres > "$2/initdb.log" 2>&1
# Shared mappings outside of the data directory: mapped files are not this test.
echo "dynamic_shared_memory_type = posix
shared_memory_type = mmap
shared_buffers = 4MB
max_connections = 20
checkpoint_timeout = 30s
max_wal_size = 32MB
min_wal_size = 32MB
wal_recycle = off
listen_addresses = ''
unix_socket_directories = '$2'" >> pg/postgresql.conf
# A child, not a daemon: a process tree that is attached to holds it.
postgres -D pg > "$2/server.log" 2>&1 &
server=$!
until pg_isready -q; do sleep 0.1; done
pgbench -q -i -s 1 > "$2/pgbench-init.log" 2>&1
psql -qc 'CREATE TABLE ops (number bigint PRIMARY KEY)'
echo "committed 0" >> marks
pgbench -n -c 3 -T 3600 > "$2/pgbench.log" 2>&1 &
bench=$!
n=0
while [ ! -e "$2/stop" ] || [ $n -lt 50 ]; do
    n=$((n + 1))
    psql -qc "INSERT INTO ops VALUES ($n)"
    echo "committed $n" >> marks
done
kill $bench
wait $bench || true
kill -INT $server
wait $server || true
