# Clones, commits, branches, merges and gc, until told to stop. $1 data, $2 folder beside it.
set -eu
export HOME="$2" GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@example.org
export GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@example.org GIT_CONFIG_NOSYSTEM=1
git config --global gc.auto 0
git config --global init.defaultBranch main
if [ ! -e "$2/origin" ]; then
    git init -q "$2/origin"
    i=0
    while [ $i -lt 12 ]; do
        i=$((i + 1))
        mkdir -p "$2/origin/dir-$i"
        j=0
        while [ $j -lt 12 ]; do
            j=$((j + 1))
            seq $i $((i * j * 5)) > "$2/origin/dir-$i/file-$j"
        done
        git -C "$2/origin" add -A
        git -C "$2/origin" commit -qm "origin $i"
    done
fi
cd "$1"
: > "$2/ready"
n=0
round=0
while [ ! -e "$2/stop" ] || [ $round -lt 2 ]; do
    round=$((round + 1))
    echo "remove $n" >> marks
    rm -rf work
    # Told not to make hard links: the origin is outside of what is replicated.
    git clone -q --no-hardlinks "$2/origin" work
    for branch in side-a side-b; do
        git -C work checkout -q -b $branch main
        for step in 1 2 3; do
            n=$((n + 1))
            echo "$n" > work/$branch-$step
            git -C work add -A
            git -C work commit -qm "op $n"
            echo "committed $n" >> marks
        done
        git -C work checkout -q main
        git -C work merge -q --no-edit $branch > "$2/merge.log" 2>&1
    done
    git -C work gc -q --prune=now
    echo "committed $n" >> marks
    git -C work branch -q -D side-a side-b
done
