# rsync --inplace and not in place, of a tree that changes, until told to stop. $1 data, $2 folder beside it.
set -eu
from="$2/from"
mkdir -p "$from/a/b" "$1/in-place" "$1/renamed"
i=0
while [ $i -lt 60 ]; do
    i=$((i + 1))
    head -c $((i * 1777)) /dev/urandom > "$from/a/file-$i"
done
ln -s a/file-1 "$from/symlink"
ln "$from/a/file-2" "$from/a/b/link"
: > "$2/ready"
i=0
while [ ! -e "$2/stop" ]; do
    i=$((i + 1))
    k=$((i % 60 + 1))
    dd if=/dev/urandom of="$from/a/file-$k" bs=512 seek=$((i % 50)) count=3 conv=notrunc 2> /dev/null
    mv "$from/a/file-$((i % 7 + 10))" "$from/a/b/moved-$((i % 7))"
    cp "$from/a/b/moved-$((i % 7))" "$from/a/file-$((i % 7 + 10))"
    chmod 6$((i % 8))4 "$from/a/file-$k"
    rsync -aHAXc --inplace --no-whole-file --delete "$from/" "$1/in-place/"
    rsync -aHAXc --delete-delay --sparse "$from/" "$1/renamed/"
done
diff -r "$from" "$1/in-place"
diff -r "$from" "$1/renamed"
