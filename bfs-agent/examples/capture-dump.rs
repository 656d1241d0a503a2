//! Runs a command under capture and prints every event in one line:
//! `capture-dump [--quiet] [--inline-max N] [--ring BYTES] DIR -- COMMAND...`

use std::{
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use bfs_agent::primary::capture::{LoadOptions, Probes};
use bfs_common::abi::{Event, InodeAttr, counter, flag, kind};

struct Options {
    quiet: bool,
    inline_max: Option<u32>,
    ring_bytes: Option<u32>,
    dir: String,
    command: Vec<String>,
}

fn options() -> anyhow::Result<Options> {
    let mut options =
        Options { quiet: false, inline_max: None, ring_bytes: None, dir: String::new(), command: Vec::new() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quiet" => options.quiet = true,
            "--inline-max" => options.inline_max = Some(args.next().context("--inline-max N")?.parse()?),
            "--ring" => options.ring_bytes = Some(args.next().context("--ring BYTES")?.parse()?),
            "--" => break,
            _ => options.dir = arg,
        }
    }
    options.command = args.collect();
    if options.dir.is_empty() || options.command.is_empty() {
        bail!("usage: capture-dump [--quiet] [--inline-max N] [--ring BYTES] DIR -- COMMAND...");
    }
    Ok(options)
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let stat = rustix::fs::stat(options.dir.as_str()).context("cannot look at the directory")?;
    // The kernel's form of a device number, which differs from the one of stat(2).
    let device = rustix::fs::major(stat.st_dev) << 20 | rustix::fs::minor(stat.st_dev);
    let mut load = LoadOptions::new(&format!("dump-{}", std::process::id()), vec![device]);
    load.inline_max = options.inline_max.unwrap_or(load.inline_max);
    load.ring_bytes = options.ring_bytes.unwrap_or(load.ring_bytes);
    let mut probes = Probes::load(&load)?;
    let result = run(&options, &mut probes);
    let counters = probes.counters()?;
    for (name, index) in [
        ("records", counter::RECORDS),
        ("reserve_failed", counter::RESERVE_FAILED),
        ("rescan", counter::RESCAN),
        ("inline", counter::INLINE),
        ("by_reference", counter::BY_REFERENCE),
        ("went_on", counter::WENT_ON),
        ("unreadable", counter::USER_UNREADABLE),
        ("no_enter", counter::NO_ENTER),
        ("compat", counter::COMPAT),
        ("tasks_full", counter::TASKS_FULL),
        ("data_lost", counter::DATA_LOST),
    ] {
        eprint!("{name}={} ", counters.get(index));
    }
    eprintln!();
    eprintln!("misses {:?} suspects {:?}", probes.recursion_misses()?, probes.drain_suspects()?.len());
    probes.unpin()?;
    result
}

fn run(options: &Options, probes: &mut Probes) -> anyhow::Result<()> {
    let (reader, mut writer) = io::pipe()?;
    let raw = reader.as_raw_fd();
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]).stdin(Stdio::null());
    // SAFETY: read(2) is async-signal-safe; the descriptor is inherited.
    unsafe {
        command.pre_exec(move || {
            let mut byte = 0u8;
            if libc::read(raw, (&raw mut byte).cast(), 1) != 1 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    // spawn returns only after the exec, so the handshake needs a thread of its own.
    let (ids, received) = std::sync::mpsc::channel();
    let child = std::thread::spawn(move || -> io::Result<_> {
        let mut child = command.spawn()?;
        let _ = ids.send(());
        child.wait()
    });
    let pid = wait_for_child()?;
    probes.select_task(pid, pid)?;
    writer.write_all(&[1])?;
    drop(reader);
    let _ = received;
    let started = std::time::Instant::now();
    let (mut records, mut bytes) = (0u64, 0u64);
    loop {
        let done = child.is_finished();
        let mut any = false;
        while let Some((record, position)) = probes.ring().next() {
            any = true;
            records += 1;
            bytes += record.bytes().len() as u64;
            if !options.quiet {
                print_event(record.event().context("malformed record")?)?;
            }
            probes.ring().release(position);
        }
        if done && !any {
            break;
        }
        if !any {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let status = child.join().map_err(|_| anyhow::anyhow!("the thread of the child panicked"))??;
    eprintln!("{status} after {:?}: {records} records, {bytes} bytes", started.elapsed());
    Ok(())
}

/// The child of this process, once it is there.
fn wait_for_child() -> anyhow::Result<u32> {
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    loop {
        for task in std::fs::read_dir("/proc/self/task")? {
            let mut text = String::new();
            std::fs::File::open(task?.path().join("children"))?.read_to_string(&mut text)?;
            if let Some(pid) = text.split_whitespace().next() {
                return Ok(pid.parse()?);
            }
        }
        if std::time::Instant::now() > deadline {
            bail!("no child");
        }
        std::thread::yield_now();
    }
}

fn flags(bits: u16) -> String {
    let names = [
        (flag::INLINE, "INLINE"),
        (flag::BY_REFERENCE, "BY_REFERENCE"),
        (flag::OFFSET_UNKNOWN, "OFFSET_UNKNOWN"),
        (flag::FAILED, "FAILED"),
        (flag::CREATED, "CREATED"),
        (flag::TRUNCATED, "TRUNCATED"),
        (flag::PATH_UNREADABLE, "PATH_UNREADABLE"),
        (flag::PATH_SHARED, "PATH_SHARED"),
        (flag::UNLINKED, "UNLINKED"),
        (flag::SHARED_FILE, "SHARED_FILE"),
        (flag::DATA_LOST, "DATA_LOST"),
        (flag::APPEND, "APPEND"),
        (flag::PARENT1_ATTR, "PARENT1"),
        (flag::PARENT2_ATTR, "PARENT2"),
    ];
    names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect::<Vec<_>>().join("|")
}

fn attr(attr: &InodeAttr) -> String {
    format!(
        "{}:{}.{} {:o} {}:{} n{} {}B",
        attr.id.dev, attr.id.ino, attr.id.generation, attr.mode, attr.uid, attr.gid, attr.nlink, attr.size
    )
}

fn print_event(event: Event<'_>) -> anyhow::Result<()> {
    let header = *event.header();
    let name = match header.kind {
        kind::FILE => "FILE",
        kind::PATH => "PATH",
        kind::PATH_ENTER => "PATH_ENTER",
        kind::DATA => "DATA",
        kind::FORK => "FORK",
        kind::EXEC => "EXEC",
        kind::EXIT => "EXIT",
        kind::TOUCH => "TOUCH",
        kind::MAPPED => "MAPPED",
        kind::COMPAT => "COMPAT",
        kind::FILE_BEGUN => "FILE_BEGUN",
        kind::PATH_BEGUN => "PATH_BEGUN",
        kind::ENDED => "ENDED",
        _ => "?",
    };
    let mut line = format!(
        "{name} {}/{} nr={} ret={} {}us [{}]",
        header.tid,
        header.tgid,
        header.nr.cast_signed(),
        header.ret,
        header.end_ns.saturating_sub(header.start_ns) / 1000,
        flags(header.flags)
    );
    match event {
        Event::File { event, name, data } => {
            line += &format!(
                " {:?} ({}) in ({}) at {} +{} range {}..{} f_flags {:o} data {} {:?}",
                String::from_utf8_lossy(name),
                attr(&event.attr),
                attr(&event.parent),
                event.file_offset,
                event.count,
                event.range_start,
                event.range_end,
                event.f_flags,
                data.len(),
                String::from_utf8_lossy(&data[..data.len().min(24)])
            );
        }
        Event::Data { event, data } => line += &format!(" offset {} len {}", event.offset, data.len()),
        Event::Path { event, path1, path2 } => {
            line += &format!(
                " {:?} from ({}) {:?} from ({}) root {}",
                String::from_utf8_lossy(path1),
                attr(&event.base1),
                String::from_utf8_lossy(path2),
                attr(&event.base2),
                event.root.ino
            );
        }
        Event::Task { event } => line += &format!(" value {} last {}", event.value, event.last_thread),
        Event::Run { event } => {
            line += &format!(" ({}) at {} in {} calls", attr(&event.attr), event.file_offset, event.calls);
        }
        Event::Dirty { event } => {
            line += &format!(" inode {} at {} +{}", event.id.ino, event.offset, event.len);
        }
        Event::Foreign { event } => line += &format!(" inode {} how {}", event.id.ino, event.how),
        Event::Failed { event } => line += &format!(" inode {}", event.id.ino),
    }
    writeln!(io::stdout(), "{line}")?;
    Ok(())
}
