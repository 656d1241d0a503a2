# Redis with an append-only file that is rewritten all the time, until told to stop. $1 data, $2 folder beside it.
set -eu
redis-server --dir "$1" --port 0 --unixsocket "$2/redis.sock" --appendonly yes --appendfsync everysec --save '1 1' \
    --aof-use-rdb-preamble no --daemonize no > "$2/redis.log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || :' EXIT
cli="redis-cli -s $2/redis.sock"
until $cli ping > /dev/null 2>&1; do kill -0 $server; done
: > "$2/ready"
i=0
while [ ! -e "$2/stop" ]; do
    i=$((i + 1))
    $cli eval 'for j = 1, 300 do redis.call("set", "key-" .. j, ARGV[1] .. string.rep("x", j)) end
        redis.call("set", "turn", ARGV[1])' 0 "$i" > /dev/null
    [ $((i % 10)) != 0 ] || $cli bgrewriteaof > /dev/null
    echo "$i" > "$2/turn.new"
    mv "$2/turn.new" "$2/turn"
done
$cli shutdown > /dev/null || :
wait $server
trap - EXIT
