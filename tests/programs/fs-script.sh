# Renames, appends, temporaries, links and attributes until told to stop. $1 data, $2 folder beside it.
set -eu
cd "$1"
: > "$2/ready"
i=0
while [ ! -e "$2/stop" ] || [ $i -lt 200 ]; do
    i=$((i + 1))
    d=d$((i % 7))
    k=$((i % 5))
    mkdir -p $d/sub
    echo $i > state.tmp
    mv state.tmp state
    echo "line $i" >> $d/log
    echo "data $i" > $d/new
    mv $d/new $d/name-$k
    ln -f $d/name-$k $d/link
    ln -sfn name-$k $d/symlink
    chmod 6$((i % 8))0 $d/link
    [ -p $d/fifo ] || mkfifo $d/fifo
    touch -d "@10000000$k.12345678$k" $d/sub
    truncate -s $((i * 37 % 9000)) $d/holes
    dd if=/dev/urandom of=$d/holes bs=100 count=1 seek=$((i % 40)) conv=notrunc 2>/dev/null
    mv $d/sub moved-$k
    mv moved-$k $d/sub
    chown $((i % 3)):$((i % 4)) $d/symlink $d/name-$k 2>/dev/null
    : > "$d/a name with blanks and	a tab-$k"
    rm -f "$d"/a*
    if [ $((i % 11)) = 0 ]; then
        # A directory takes the place of another, and the other is gone.
        rm -rf old
        mv $d old
        mkdir $d
        rm -rf d$(((i + 3) % 7))
    fi
    echo "round $i" >> marks
done
