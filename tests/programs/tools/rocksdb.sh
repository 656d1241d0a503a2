# RocksDB's own load: a log, tables made and renamed, compaction, direct I/O, until told to stop. $1 data, $2 folder
# beside it.
set -eu
: > "$2/ready"
i=0
while [ ! -e "$2/stop" ]; do
    i=$((i + 1))
    db_bench --db="$1/db-$((i % 2))" --benchmarks=fillrandom,overwrite,deleterandom,compact --num=4000 --value_size=300 \
        --write_buffer_size=200000 --target_file_size_base=100000 --use_direct_io_for_flush_and_compaction=true \
        --use_existing_db=$((i > 2)) --threads=2 --sync=$((i % 2)) --seed=$i > "$2/said" 2>&1
done
