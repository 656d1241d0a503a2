# LMDB, which stores through a shared mapping, until told to stop. $1 data, $2 folder beside it.
set -eu
mkdir -p "$1/database"
: > "$2/ready"
i=0
while [ ! -e "$2/stop" ]; do
    i=$((i + 1))
    j=0
    while [ $j -lt 100 ]; do
        j=$((j + 1))
        printf 'key-%d\nvalue %d of turn %d %0200d\n' "$j" "$j" "$i" "$i"
    done | mdb_load -T "$1/database"
done
