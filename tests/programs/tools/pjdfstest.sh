# pjdfstest, again and again until told to stop. $1 data, $2 folder beside it, $3 the program. Which of its tests
# fail must be the same as without replication.
set -eu
data=$1 aux=$2 pjdfstest=$3
cat > "$aux/pjdfstest.toml" <<'CONFIG'
[features]
posix_fallocate = {}
utimensat = {}
rename_ctime = {}
utime_now = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"], ["bin", "bin"]]
CONFIG
failures() {
    "$pjdfstest" -c "$aux/pjdfstest.toml" -p "$1" > "$aux/said" 2>&1 || :
    [ "$(grep -c ' ok$' "$aux/said")" -gt 300 ]
    grep FAILED "$aux/said" | sort
}
mkdir -p "$aux/beside"
failures "$aux/beside" > "$aux/expected"
: > "$aux/ready"
while [ ! -e "$aux/stop" ]; do
    failures "$data" > "$aux/found"
    cmp "$aux/expected" "$aux/found"
done
