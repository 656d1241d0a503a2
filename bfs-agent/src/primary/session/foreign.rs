//! What others than the selected processes change, as the kernel tells it.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bfs_common::abi::{EventHeader, ForeignEvent, InodeId, Plain, kind};
use rustix::fs::{CWD, Mode, OFlags};

use super::link::{Link, probes_failed};
use crate::primary::capture::Probes;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{ForeignStatus, StrangerStatus};
use crate::primary::engine::Engine;
use crate::primary::engine::host::HostError;
use crate::primary::reader::kernel_dev;
use crate::primary::rollback::busy::is_for_writing;

/// A record of a change by others was taken out of the ring: what changes from now on gets another. Until now it
/// stood for all changes of its object, so that is when it ended.
pub(super) fn taken(probes: &Probes, record: &mut [u8]) -> Result<(), HostError> {
    let of = std::mem::offset_of!(EventHeader, kind);
    if record.get(of..of + 2) != Some(kind::FOREIGN.to_ne_bytes().as_slice()) {
        return Ok(());
    }
    let Some(event) = ForeignEvent::read_from(record) else { return Ok(()) };
    probes.foreign().taken(event.id).map_err(probes_failed)?;
    let end = std::mem::offset_of!(EventHeader, end_ns);
    let now = monotonic_ns().max(event.header.end_ns);
    record[end..end + 8].copy_from_slice(&now.to_ne_bytes());
    Ok(())
}

/// The files in scope that processes which are not selected have open for writing, each with one of them.
pub(super) fn writers(link: &Link) -> Result<Vec<(InodeId, u32)>, HostError> {
    let selected = || -> Result<HashSet<u32>, HostError> {
        Ok(link.probes.selected_processes().map_err(probes_failed)?.into_iter().collect())
    };
    let before = selected()?;
    let devices = link.reader.devices();
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == own || before.contains(&pid) {
            continue;
        }
        let process = entry.path();
        // A process that ends meanwhile has closed what it had.
        for fd in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
            let Ok(meta) = fs::metadata(fd.path()) else { continue };
            if !meta.is_file()
                || !devices.contains(&kernel_dev(meta.dev()))
                || !is_for_writing(&process, &fd.file_name())
            {
                continue;
            }
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let Ok(file) = rustix::fs::openat(CWD, fd.path(), flags, Mode::empty()) else { continue };
            if link.probes.foreign().concerns(file.as_fd()).map_err(probes_failed)?
                && let Ok(Some(inode)) = link.reader.inode_of(file.as_fd())
            {
                found.push((inode, pid));
            }
        }
    }
    // A process that was born meanwhile is selected from its first moment, if its parent is.
    let after = selected()?;
    found.retain(|(_, pid)| !after.contains(pid) && Path::new(&format!("/proc/{pid}")).exists());
    Ok(found.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect())
}

fn text(command: &[u8; 16]) -> String {
    String::from_utf8_lossy(command).trim_end_matches('\0').to_owned()
}

/// What the process is called, or was when it first changed something.
pub(super) fn command_of(probes: &Probes, tgid: u32) -> Option<String> {
    if let Ok(name) = fs::read_to_string(format!("/proc/{tgid}/comm")) {
        return Some(name.trim_end().to_owned());
    }
    let strangers = probes.foreign().strangers().ok()?;
    strangers.iter().find(|s| s.0 == tgid).map(|s| text(&s.1.command))
}

/// Who changed what.
pub(super) fn status(engine: &Engine, probes: &Probes) -> ForeignStatus {
    let mut processes: Vec<StrangerStatus> = probes
        .foreign()
        .strangers()
        .unwrap_or_default()
        .into_iter()
        .map(|(pid, s)| StrangerStatus { pid, command: text(&s.command), changes: s.changes })
        .collect();
    processes.sort_by(|a, b| b.changes.cmp(&a.changes).then(a.pid.cmp(&b.pid)));
    let (ignored, ignored_count) = engine.ignored();
    ForeignStatus {
        policy: engine.foreign(),
        is_seen: probes.foreign().is_seen(),
        processes,
        open_for_writing: engine.foreign_writers() as u64,
        ignored,
        ignored_count: ignored_count as u64,
    }
}
