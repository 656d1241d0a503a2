# stress-ng with all that it does to file systems, until told to stop. $1 data, $2 folder beside it, $3 workers of
# each kind.
set -eu
: > "$2/ready"
while [ ! -e "$2/stop" ]; do
    # What a kernel or a file system does not have is left out by itself.
    stress-ng --quiet --class filesystem --all "$3" --timeout 3 --temp-path "$1" --hdd-bytes 4m \
        --iomix-bytes 4m --copy-file-bytes 4m --fallocate-bytes 4m > "$2/said" 2>&1 || [ $? -le 4 ]
done
