# Recovers the copy of a data directory ($1) and prints how many numbered commits it has.
# Fails when the books of pgbench do not balance or a number is missing.
set -eu
if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid postgres --regid "$(id -g postgres)" --clear-groups /bin/sh "$0" "$@"
fi
PATH="$PATH:$(ls -d /usr/lib/postgresql/*/bin | tail -1)"
sockets=$(mktemp -d /tmp/bfs-pg-XXXXXX)
export PGHOST="$sockets" PGUSER=postgres PGDATABASE=postgres
# The server of the primary is another one.
rm -f "$1/postmaster.pid"
trap 'pg_ctl -D "$1" -m immediate stop > /dev/null 2>&1 || true; rm -rf "$sockets"' EXIT
pg_ctl -D "$1" -l "$1/check.log" -o "-c unix_socket_directories=$sockets -c fsync=off" -w start > /dev/null
books=$(psql -qAtc "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
  AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
  AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)")
[ "$books" = t ] || { echo "the books of pgbench do not balance ($books)"; exit 1; }
whole=$(psql -qAtc "SELECT count(*) = coalesce(max(number), 0) FROM ops")
[ "$whole" = t ] || { echo "a numbered commit is missing"; exit 1; }
psql -qAtc "SELECT count(*) FROM ops"
