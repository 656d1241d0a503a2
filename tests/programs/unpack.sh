# Unpacks the archive and deletes the tree, until told to stop. $1 data, $2 folder beside it.
set -eu
cd "$1"
: > "$2/ready"
n=0
while [ ! -e "$2/stop" ] || [ $n -lt 2 ]; do
    n=$((n + 1))
    echo "unpack $n" >> marks
    mkdir tree-$n
    tar -xpf "$2/src.tar" -C tree-$n
    echo "unpacked $n" >> marks
    # Long enough for a checkpoint now and then to find the whole tree.
    sleep 0.3
    echo "remove $n" >> marks
    rm -rf tree-$n
    echo "removed $n" >> marks
done
mkdir last
tar -xpf "$2/src.tar" -C last
echo "end $n" >> marks
