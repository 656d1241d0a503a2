//! The programs whose time is measured, as shell scripts: what they prepare, what is measured, what ends them.
//!
//! A script has `$data` (the directory that is replicated), `$inputs` (what was made once for all runs), `$aux` (a
//! folder for marks and sockets), `$tool` (bfs-workload) and `$amount`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use bfs_tests::programs::unpack;
use bfs_tests::world::command_ok;

use crate::setup::{self, Tool};

/// See the module.
pub struct Workload {
    /// As the table has it.
    pub name: &'static str,
    /// The highest ratio that is aimed at, pinned.
    pub aim: Option<f64>,
    /// What it needs.
    pub tools: &'static [Tool],
    /// Makes what it reads, once.
    pub inputs: fn(&Path) -> Result<()>,
    /// Not measured.
    pub prepare: &'static str,
    /// Measured; may leave its own time in `$aux/milliseconds`.
    pub work: &'static str,
    /// Not measured.
    pub after: &'static str,
    /// `$amount` of a short run, of a run beside peers, and the usual one.
    pub amounts: [u64; 3],
    /// Whether it is measured beside peers also in a run that is not `--long`.
    pub beside_peers: bool,
}

const PLAIN: Workload = Workload {
    name: "",
    aim: None,
    tools: &[],
    inputs: |_| Ok(()),
    prepare: "",
    work: "",
    after: "",
    amounts: [0; 3],
    beside_peers: false,
};

/// 4 KiB at a time where there is something already: no memory has to be found for what is written.
const OVER_A_FILE: Workload = Workload {
    aim: Some(1.08),
    tools: FIO,
    prepare: "dd if=/dev/zero of=\"$data/file\" bs=1M count=$amount status=none",
    ..PLAIN
};

const FIO: &[Tool] = &[("fio", "fio", "a workload of `bench`")];
const CC: &[Tool] = &[("cc", "gcc libc6-dev", "compiles in a workload of `bench`")];
const POSTGRES: &[Tool] = &[("pgbench", "postgresql", "a workload of `bench`")];
const REDIS: &[Tool] = &[
    ("redis-benchmark", "redis-tools", "a workload of `bench`"),
    ("redis-server", "redis-server", "the same"),
];

/// fio's own time, without its start; `$amount` MiB in one file. `$1` block size, `$2` and so on: more options.
macro_rules! fio {
    ($block:literal, $options:literal) => {
        concat!(
            "fio --name=w --filename=\"$data/file\" --size=${amount}m --ioengine=psync --thread \
             --fallocate=none --gtod_reduce=1 --output-format=terse --terse-version=3 --bs=",
            $block,
            " ",
            $options,
            " > \"$aux/fio\"; cut -d';' -f50 \"$aux/fio\" > \"$aux/milliseconds\""
        )
    };
}

/// `run` runs a command as the user of the database, whose programs are found.
macro_rules! as_postgres {
    () => {
        "run() { setpriv --reuid postgres --regid \"$(id -g postgres)\" --clear-groups \"$@\"; }
         PATH=\"$PATH:$(ls -d /usr/lib/postgresql/*/bin | tail -1)\"
         "
    };
}

/// All of them.
pub const WORKLOADS: [Workload; 13] = [
    Workload {
        name: "fio 64 KiB",
        aim: Some(1.04),
        tools: FIO,
        work: fio!("64k", "--rw=write"),
        amounts: [128, 512, 1024],
        beside_peers: true,
        ..PLAIN
    },
    Workload {
        name: "fio 4 KiB",
        aim: Some(1.08),
        tools: FIO,
        work: fio!("4k", "--rw=write"),
        amounts: [64, 256, 800],
        beside_peers: true,
        ..PLAIN
    },
    Workload {
        name: "fio 4 KiB, over a file",
        work: fio!("4k", "--rw=write"),
        amounts: [64, 256, 800],
        ..OVER_A_FILE
    },
    Workload {
        name: "fio 4 KiB, random, over a file",
        work: fio!("4k", "--rw=randwrite"),
        amounts: [64, 128, 512],
        ..OVER_A_FILE
    },
    Workload {
        name: "fio 64 KiB, O_DIRECT",
        aim: Some(1.04),
        tools: FIO,
        work: fio!("64k", "--rw=write --direct=1"),
        amounts: [32, 128, 512],
        ..PLAIN
    },
    Workload {
        name: "fio 4 KiB, O_DIRECT",
        aim: Some(1.08),
        tools: FIO,
        work: fio!("4k", "--rw=write --direct=1"),
        amounts: [8, 32, 64],
        ..PLAIN
    },
    Workload {
        name: "dd 128 B",
        aim: Some(1.35),
        work: "dd if=/dev/zero of=\"$data/file\" bs=128 count=$amount status=none",
        amounts: [200_000, 300_000, 1_200_000],
        beside_peers: true,
        ..PLAIN
    },
    Workload {
        name: "create, rename, unlink",
        work: "\"$tool\" churn \"$data\" \"$aux\" $amount",
        amounts: [5_000, 20_000, 50_000],
        beside_peers: true,
        ..PLAIN
    },
    Workload {
        name: "unpack a source tree",
        aim: Some(1.10),
        inputs: unpack::archive,
        // 5,300 names each.
        work: "i=0; while [ $i -lt $amount ]; do mkdir \"$data/$i\"; tar -xpf \"$inputs/src.tar\" -C \"$data/$i\"; \
               i=$((i + 1)); done",
        amounts: [1, 1, 3],
        beside_peers: true,
        ..PLAIN
    },
    Workload {
        name: "compile, gcc -j2",
        aim: Some(1.03),
        tools: CC,
        inputs: c_project,
        prepare: "cp -a \"$inputs/project\" \"$data/project\"",
        work: "cd \"$data/project\"; seq $amount | xargs -P 2 -I N gcc -O1 -g -c N.c -o N.o; gcc -o program *.o",
        amounts: [4, 12, 40],
        ..PLAIN
    },
    Workload {
        name: "SQLite inserts",
        aim: Some(1.03),
        work: "\"$tool\" sqlite-inserts \"$data\" \"$aux\" $amount",
        amounts: [200, 500, 1_500],
        beside_peers: true,
        ..PLAIN
    },
    Workload {
        name: "pgbench, 2 clients",
        aim: Some(1.03),
        tools: POSTGRES,
        inputs: postgres_cluster,
        prepare: concat!(
            as_postgres!(),
            "cp -a \"$inputs/pg\" \"$data/pg\"; chown postgres \"$aux\"
            run pg_ctl -D \"$data/pg\" -l \"$aux/server.log\" -w -s start \
                -o \"-c unix_socket_directories=$aux -c listen_addresses=\""
        ),
        work: "run pgbench -h \"$aux\" -n -c 2 -t $amount postgres > \"$aux/pgbench.log\" 2>&1",
        after: "run pg_ctl -D \"$data/pg\" -w -s -m fast stop",
        amounts: [200, 500, 2_000],
        ..PLAIN
    },
    Workload {
        name: "Redis, append-only file",
        aim: Some(1.05),
        tools: REDIS,
        prepare: "redis-server --dir \"$data\" --port 0 --unixsocket \"$aux/redis.sock\" --appendonly yes \
            --appendfsync everysec --save '' --daemonize no > \"$aux/redis.log\" 2>&1 & server=$!
            until redis-cli -s \"$aux/redis.sock\" ping > /dev/null 2>&1; do kill -0 $server; sleep 0.02; done",
        work: "redis-benchmark -s \"$aux/redis.sock\" -q -t set -n $amount -c 10 -d 100 -r 100000 \
            > \"$aux/benchmark.log\" 2>&1",
        after: "redis-cli -s \"$aux/redis.sock\" shutdown > \"$aux/shutdown.log\" 2>&1 || :; wait $server",
        amounts: [20_000, 50_000, 150_000],
        ..PLAIN
    },
];

impl Workload {
    /// Provides what it needs and makes its inputs in the folder.
    ///
    /// # Errors
    /// What is missing here.
    pub fn provide(&self, folder: &Path) -> Result<()> {
        setup::tools(self.tools)?;
        // Servers work as other users.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        (self.inputs)(folder)
    }
}

/// C files that make a compiler work for about a tenth of a second each.
fn c_project(folder: &Path) -> Result<()> {
    let project = folder.join("project");
    fs::create_dir(&project)?;
    let files = WORKLOADS.iter().find(|w| w.tools == CC).map_or(0, |w| w.amounts[2]);
    for file in 1..=files {
        let mut text = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n".to_owned();
        for function in 0..120 {
            text += &format!(
                "int f{file}_{function}(int a, const char *s) {{\n\
                 \tchar b[64]; int n = 0;\n\
                 \tfor (int i = 0; i < a; i++) {{ snprintf(b, sizeof b, \"%d %s\", i * {function}, s); \
                 n += (int)strlen(b) ^ (i % {}); }}\n\
                 \treturn n > {file} ? n : atoi(s);\n}}\n",
                function + 3
            );
        }
        fs::write(project.join(format!("{file}.c")), text)?;
    }
    fs::write(project.join("main.c"), "int main(void) { return 0; }\n")?;
    command_ok(Command::new("gcc").args(["-c", "main.c"]).current_dir(&project)).map(drop)
}

/// A database that pgbench has initialised.
fn postgres_cluster(folder: &Path) -> Result<()> {
    let script = concat!(
        "set -eu; exec > \"$1/cluster.log\" 2>&1; ",
        as_postgres!(),
        "mkdir \"$1/pg\" \"$1/run\"; chown postgres \"$1/pg\" \"$1/run\"; cd \"$1/run\"
        run initdb -D \"$1/pg\" -A trust
        run pg_ctl -D \"$1/pg\" -l \"$1/run/log\" -w start -o \"-c unix_socket_directories=$1/run -c listen_addresses=\"
        trap 'run pg_ctl -D \"$1/pg\" -w -m fast stop' EXIT
        run pgbench -h \"$1/run\" -q -i -s 4 postgres"
    );
    command_ok(Command::new("/bin/sh").args(["-c", script, "sh"]).arg(folder)).map(drop)
}
