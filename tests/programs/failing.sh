# Calls that fail, and calls that succeed between them. $1 data, $2 folder beside it.
set -u
cd "$1"
fails() { if "$@" 2>> errors.log; then echo "did not fail: $*" >> "$AUX/unexpected"; fi; }
AUX="$2"
: > "$AUX/ready"
: > errors.log
round=0
while [ ! -e "$AUX/stop" ] || [ $round -lt 3 ]; do
    round=$((round + 1))
    # EEXIST, ENOENT, ENOTDIR, ENOTEMPTY, EISDIR, ELOOP
    mkdir -p here/below
    echo "round $round" > here/file
    fails mkdir here
    fails ln here/file here/below/../file
    fails ln -s nowhere here/file
    fails mkfifo here/file
    fails rmdir here
    fails rm missing
    fails mv -T here here/below/inside
    fails mkdir here/file/sub
    fails chmod 600 missing
    fails truncate -s 100 here
    fails sh -c 'set -C; echo x > here/file'
    ln -sfn loop loop
    fails sh -c 'echo x > loop/x'
    # EACCES and EPERM, as another user
    chmod 755 here
    chmod 600 here/file
    fails setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'echo x > here/new'
    fails setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'echo x >> here/file'
    fails setpriv --reuid 65534 --regid 65534 --clear-groups rm -f here/file
    fails setpriv --reuid 65534 --regid 65534 --clear-groups mv here/file here/other
    fails setpriv --reuid 65534 --regid 65534 --clear-groups chmod 777 here/file
    fails setpriv --reuid 65534 --regid 65534 --clear-groups chown 65534 here/file
    fails setpriv --reuid 65534 --regid 65534 --clear-groups touch -d @5 here/file
    # ENOSPC: what fitted stays.
    if [ -e "$AUX/small" ]; then
        fails dd if=/dev/zero of=full bs=64k count=10000
        fails sh -c 'i=0; while echo $i > here/many-$i; do i=$((i + 1)); done; exit 1'
        fails cp full here/below/copy
        rm -f full here/many-* here/below/copy
    fi
    echo "round $round" >> marks
    rm -rf here/below
done
if [ -e "$AUX/small" ]; then
    dd if=/dev/zero of=full bs=64k count=10000 2>> errors.log
fi
[ ! -e "$AUX/unexpected" ]
