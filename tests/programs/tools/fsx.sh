# fsx, several at once in one tree, until told to stop. $1 data, $2 folder beside it, $3 the program, then
# seeds. It compares what it reads with what it wrote, and fails where a file is not what it should be.
set -eu
data=$1 aux=$2 fsx=$3
shift 3
cd "$data"
cat > "$aux/fsx.toml" <<'CONFIG'
flen = 262144
[opsize]
max = 65536
[weights]
close_open = 1
read = 5
write = 10
mapread = 3
mapwrite = 5
truncate = 4
invalidate = 1
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 1
punch_hole = 2
sendfile = 2
posix_fadvise = 1
copy_file_range = 3
CONFIG
one() {
    turn=0
    while [ ! -e "$aux/stop" ]; do
        turn=$((turn + 1))
        "$fsx" -q -f "$aux/fsx.toml" -S $(($1 * 1000 + turn)) -N 400 -P "$aux" "fsx-$1" >> "$aux/said" || exit 1
    done
}
processes=""
for seed in "$@"; do
    one "$seed" &
    processes="$processes $!"
done
: > "$aux/ready"
for process in $processes; do wait "$process"; done
