//! Loading the probes, pinning them, and the maps that they share with the agent.
//!
//! Everything of a group is pinned in one directory of the BPF file system: maps, programs and
//! links. The probes go on when the agent dies; its successor [adopts](Probes::adopt) them.

mod tasks;

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{Ordering, fence},
};

use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader,
    programs::{BtfTracePoint, ProgramError, RawTracePoint, links::FdLink},
};
use bfs_common::abi::{
    ABI_VERSION, DEVICES_MAX, FAILING_MAX, InodeId, Offsets, Plain, REQUESTS_MAX, Request, SUSPECTS_MAX,
    Settings, Suspect, counter,
};

use super::{
    CaptureError,
    bpf_fs::{BPF_FS, mount_bpf_fs, no_bpf_fs},
    btf,
    foreign::{self, Foreign},
    log,
    log::ProbeLog,
    mapped::MappedFiles,
    ring::Ring,
    sys, uring,
};

/// The compiled probes.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bfs-ebpf"));

/// Programs, each of the name of its tracepoint. Attached in this order: those that keep the set of
/// tasks first.
const PROGRAMS: [&str; 6] = [
    "sched_process_fork",
    "sched_process_exec",
    "sched_process_exit",
    "cgroup_attach_task",
    "sys_exit",
    "sys_enter",
];
/// The probe of dirty pages. A kernel may refuse it: then files that are mapped are read as a whole at each
/// checkpoint.
const DIRTIED: &str = "writeback_dirty_folio";
/// Attached to nothing, run by the agent with a descriptor of its own.
const DIRECT_IO: &str = "direct_io";
/// The same.
const WRITABLE: &str = "writable_mappings";
const QUERIES: [&str; 4] = [DIRECT_IO, WRITABLE, foreign::WRITERS, foreign::CONCERNS];
const MAPS: [&str; 13] = [
    "RING",
    "TASKS",
    "REQUESTS",
    "RINGS",
    "SUSPECTS",
    "MAPPED",
    "FOREIGN",
    "FAILING",
    "STRANGERS",
    "ROOTS",
    "COUNTERS",
    "META",
    "DEVICES",
];

/// Largest [`LoadOptions::inline_max`]: what the loop over chunks in the probe can take.
pub const INLINE_MAX: u32 = 1 << 21;

/// Where the probes of a group are pinned.
///
/// The BPF file system takes no dots in names, so everything but letters, digits, `-` and `_`
/// is written as `%` and two digits.
#[must_use]
pub fn group_dir(group: &str) -> PathBuf {
    let mut name = String::new();
    for byte in group.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02x}"));
        }
    }
    Path::new(BPF_FS).join("bfs").join(name)
}

/// How the probes are loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where maps, programs and links are pinned: [`group_dir`].
    pub pin_dir: PathBuf,
    /// Devices with subtrees in scope (`s_dev` in the kernel's form; on btrfs the anonymous device
    /// of the subvolume), at most [`DEVICES_MAX`].
    pub devices: Vec<u32>,
    /// Whether one of them is on btrfs.
    pub btrfs: bool,
    /// Below which directories it counts what others change; none: on all of these devices.
    pub roots: Vec<InodeId>,
    /// Identity of the cgroup whose tasks are selected, of those that are born or moved into it too
    /// (the inode of its directory); `None`: the selected tasks and their children.
    pub cgroup: Option<u64>,
    /// Whether to look at what others change, where the kernel tells.
    pub foreign: bool,
    /// Largest write whose bytes are copied in the probe, at most [`INLINE_MAX`].
    pub inline_max: u32,
    /// Whether a close of a descriptor that could be written to has a record.
    pub closes: bool,
    /// Bytes of the ring: a power of two, at least a page.
    pub ring_bytes: u32,
    /// The kernel's types: [`btf::KERNEL_BTF`].
    pub btf: PathBuf,
    /// How much the probes log: [`log::wanted`].
    pub log: u8,
}

impl LoadOptions {
    /// Options with a ring of 64 MiB and writes of up to 1 KiB inline.
    ///
    /// The record costs the same either way; beyond 1 KiB the copy into the ring, which is larger
    /// than the caches, costs the program more than the record (4 KiB: one and a half times as much).
    #[must_use]
    pub fn new(group: &str, devices: Vec<u32>) -> Self {
        Self {
            pin_dir: group_dir(group),
            devices,
            btrfs: false,
            roots: Vec::new(),
            cgroup: None,
            foreign: true,
            inline_max: 1 << 10,
            closes: false,
            ring_bytes: 64 << 20,
            btf: PathBuf::from(btf::KERNEL_BTF),
            log: log::wanted(),
        }
    }

    fn settings(&self) -> Result<Settings, CaptureError> {
        let mut settings = Settings {
            inline_max: self.inline_max,
            closes: u32::from(self.closes),
            foreign: u32::from(self.foreign),
            ..Settings::default()
        };
        if self.devices.is_empty() || self.devices.len() > DEVICES_MAX || self.devices.contains(&0) {
            return Err(CaptureError::Options(format!(
                "1 to {DEVICES_MAX} file systems can be in scope, not {}",
                self.devices.len()
            )));
        }
        if self.inline_max > INLINE_MAX {
            return Err(CaptureError::Options(format!("inline_max is at most {INLINE_MAX}")));
        }
        if !self.ring_bytes.is_power_of_two() || (self.ring_bytes as usize) < sys::page_size() {
            return Err(CaptureError::Options("the ring's size is not a power of two of pages".to_owned()));
        }
        settings.devices[..self.devices.len()].copy_from_slice(&self.devices);
        let cgroup = self.cgroup.unwrap_or(0);
        (settings.cgroup_low, settings.cgroup_high) = (cgroup as u32, (cgroup >> 32) as u32);
        Ok(settings)
    }
}

/// The counters of the probes, summed over the CPUs; see [`counter`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters([u64; counter::COUNT as usize]);

impl Counters {
    /// One of [`counter`].
    #[must_use]
    pub fn get(&self, index: u32) -> u64 {
        self.0.get(index as usize).copied().unwrap_or(0)
    }
}

/// The probes of a group.
pub struct Probes {
    pin_dir: PathBuf,
    tasks: OwnedFd,
    requests: OwnedFd,
    direct_io: OwnedFd,
    suspects: OwnedFd,
    devices: OwnedFd,
    counters: OwnedFd,
    writable_mappings: OwnedFd,
    failing: OwnedFd,
    foreign: Foreign,
    mapped: MappedFiles,
    meta: OwnedFd,
    programs: Vec<(&'static str, OwnedFd)>,
    ring: Ring,
    cpus: usize,
    /// Only with [`LoadOptions::log`].
    log: Option<ProbeLog>,
    /// Whether they are known to recognise files on btrfs; of those that another agent loaded it is not known.
    btrfs: bool,
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> CaptureError {
    let what = what.into();
    move |source| CaptureError::Kernel { what, source }
}

impl Probes {
    /// Loads, pins and attaches the probes.
    pub fn load(options: &LoadOptions) -> Result<Self, CaptureError> {
        let settings = options.settings()?;
        let types = btf::KernelTypes::read(&options.btf)?;
        let offsets = btf::offsets(&types)?;
        let btrfs = offsets.btrfs_root != 0;
        if options.btrfs && !btrfs {
            return Err(CaptureError::NoBtrfs);
        }
        if !rustix::process::geteuid().is_root() {
            return Err(CaptureError::NotRoot);
        }
        mount_bpf_fs()?;
        let parent = options.pin_dir.parent().unwrap_or(Path::new(BPF_FS));
        fs::create_dir_all(parent).map_err(|source| no_bpf_fs(parent, source))?;
        match fs::create_dir(&options.pin_dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(CaptureError::AlreadyPinned { path: options.pin_dir.clone() });
            }
            Err(source) => return Err(no_bpf_fs(&options.pin_dir, source)),
        }
        let loaded = load_pinned(options, &types, &offsets, &settings).and_then(|mut ebpf| {
            let mut probes = Self::adopt(&options.pin_dir)?;
            probes.btrfs = btrfs;
            if options.log > 0 {
                probes.log = Some(ProbeLog::open(&mut ebpf)?);
            }
            Ok(probes)
        });
        if loaded.is_err() {
            // Half a set of probes is of no use to anybody.
            remove_pins(&options.pin_dir).map_err(kernel("cannot remove the pins of a failed load"))?;
        }
        loaded
    }

    /// Whether they are known to recognise files on btrfs. Of probes that another agent loaded, only where btrfs is a part
    /// of the kernel: a module may have come since.
    #[must_use]
    pub fn knows_btrfs(&self) -> bool {
        self.btrfs || btf::kernel_has_btrfs(Path::new(btf::KERNEL_BTF))
    }

    /// Takes over the probes that an agent left in `pin_dir`.
    pub fn adopt(pin_dir: &Path) -> Result<Self, CaptureError> {
        let open = |name: &str| {
            let path = pin_dir.join(name);
            sys::open_pin(&path).map_err(kernel(format!("cannot open the pin {}", path.display())))
        };
        let meta = open("META")?;
        let [found, ..] = sys::read_meta(meta.as_fd()).map_err(kernel("cannot read META"))?;
        if found != u64::from(ABI_VERSION) {
            return Err(CaptureError::AbiMismatch {
                path: pin_dir.to_owned(),
                found,
                expected: u64::from(ABI_VERSION),
            });
        }
        let mut programs = Vec::new();
        for name in PROGRAMS {
            programs.push((name, open(name)?));
            // A link that is missing would mean probes that do not run.
            open(&link_name(name))?;
        }
        // Not there on a kernel without io_uring, or without the tracepoint.
        for name in uring::PROGRAMS.map(|program| program.0).into_iter().chain(foreign::PROGRAMS) {
            if pin_dir.join(name).exists() {
                programs.push((name, open(name)?));
                open(&link_name(name))?;
            }
        }
        let mut dirtied = None;
        if pin_dir.join(DIRTIED).exists() {
            programs.push((DIRTIED, open(DIRTIED)?));
            dirtied = Some((open(DIRTIED)?, pin_dir.join(link_name(DIRTIED))));
        }
        let ring = Ring::open(open("RING")?).map_err(kernel("cannot map the ring"))?;
        Ok(Self {
            pin_dir: pin_dir.to_owned(),
            tasks: open("TASKS")?,
            requests: open("REQUESTS")?,
            direct_io: open(DIRECT_IO)?,
            suspects: open("SUSPECTS")?,
            devices: open("DEVICES")?,
            counters: open("COUNTERS")?,
            writable_mappings: open(WRITABLE)?,
            failing: open("FAILING")?,
            foreign: Foreign::open(pin_dir)?,
            mapped: MappedFiles::new(open("MAPPED")?, dirtied)?,
            meta,
            programs,
            ring,
            cpus: aya::util::nr_cpus().map_err(|(what, source)| CaptureError::Kernel {
                what: format!("cannot count the CPUs ({what})"),
                source,
            })?,
            log: None,
            btrfs: false,
        })
    }

    /// Whether something is pinned in `pin_dir`.
    #[must_use]
    pub fn are_pinned(pin_dir: &Path) -> bool {
        pin_dir.join("META").exists()
    }

    /// Removes what is pinned in `pin_dir`, also half a set of probes.
    pub fn clear(pin_dir: &Path) -> Result<(), CaptureError> {
        remove_pins(pin_dir).map_err(kernel(format!("cannot remove the pins in {}", pin_dir.display())))
    }

    /// Ends the capture: no more records, nothing for a successor.
    pub fn unpin(self) -> Result<(), CaptureError> {
        Self::clear(&self.pin_dir)
    }

    /// Looks at a further device from now on. What is going on there has no start that was seen.
    pub fn add_device(&self, dev: u32) -> Result<(), CaptureError> {
        let failed = || kernel("cannot change which file systems are looked at");
        let entries = sys::entries::<u32, [u32; DEVICES_MAX]>(self.devices.as_fd(), 1, false);
        let mut devices = entries.map_err(failed())?.first().map_or([0; DEVICES_MAX], |entry| entry.1);
        if devices.contains(&dev) {
            return Ok(());
        }
        let Some(free) = devices.iter_mut().find(|device| **device == 0) else {
            return Err(CaptureError::Options(format!(
                "{DEVICES_MAX} file systems were added already, which is the most that can be"
            )));
        };
        *free = dev;
        sys::update(self.devices.as_fd(), &0u32, &devices, 0).map_err(failed())
    }

    /// From now on each write has a record of its own (`true`), or those that go on where the last one ended have one
    /// together.
    pub fn part_writes(&mut self, part: bool) -> Result<(), CaptureError> {
        sys::read_meta(self.meta.as_fd())
            .and_then(|mut meta| {
                meta[2] = u64::from(part);
                sys::update(self.meta.as_fd(), &0u32, &meta, 0)
            })
            .map_err(kernel("cannot tell the probes how to record writes"))
    }

    /// The io_uring operations that may change a file and are not known to have ended, each with the
    /// key that [`Self::request`] takes.
    ///
    /// Complete as [`Self::in_flight`] is: an entry stands in the map before its start is taken.
    pub fn requests(&self) -> Result<Vec<(u64, Request)>, CaptureError> {
        fence(Ordering::SeqCst);
        sys::entries(self.requests.as_fd(), REQUESTS_MAX, false)
            .map_err(kernel("cannot read the asynchronous operations"))
    }

    /// One of them, if it is still there.
    pub fn request(&self, key: u64) -> Result<Option<Request>, CaptureError> {
        let mut bytes = [0; size_of::<Request>()];
        let found = sys::lookup(self.requests.as_fd(), &key, &mut bytes)
            .map_err(kernel("cannot read an asynchronous operation"))?;
        Ok(Request::read_from(&bytes).filter(|_| found))
    }

    /// Takes out one of them that nobody can carry out any more.
    pub fn forget_request(&self, key: u64) -> Result<(), CaptureError> {
        sys::delete(self.requests.as_fd(), &key)
            .map(drop)
            .map_err(kernel("cannot forget an asynchronous operation"))
    }

    /// Whether no direct I/O is in flight on the open file.
    pub fn is_at_rest(&self, file: BorrowedFd<'_>) -> Result<bool, CaptureError> {
        ask(&self.direct_io, file)
            .map(|in_flight| in_flight == 0)
            .map_err(kernel("cannot ask for direct I/O in flight"))
    }

    /// Takes out the objects whose records found no room in the ring.
    pub fn drain_suspects(&self) -> Result<Vec<(InodeId, Suspect)>, CaptureError> {
        sys::entries(self.suspects.as_fd(), SUSPECTS_MAX, true).map_err(kernel("cannot read the suspects"))
    }

    /// The next error of the disk that a call sees on a file is told again.
    pub fn tell_again(&self, file: InodeId) -> Result<(), CaptureError> {
        sys::delete(self.failing.as_fd(), &file)
            .map(drop)
            .map_err(kernel("cannot have the next error of a file told"))
    }

    /// The files of which an error was told, and is not told again yet.
    pub fn told(&self) -> Result<Vec<InodeId>, CaptureError> {
        let all = sys::entries::<InodeId, u64>(self.failing.as_fd(), FAILING_MAX, false);
        let all = all.map_err(kernel("cannot read of which files errors were told"))?;
        Ok(all.into_iter().map(|(file, _)| file).collect())
    }

    /// What others change.
    pub fn foreign(&self) -> &Foreign {
        &self.foreign
    }

    /// The files that are mapped.
    pub fn mapped(&mut self) -> &mut MappedFiles {
        &mut self.mapped
    }

    /// How many mappings there are, in whatever process, through which the file may be written; `None` where
    /// the kernel does not tell.
    pub fn writable_mappings(&self, file: BorrowedFd<'_>) -> Result<Option<u32>, CaptureError> {
        let answer = ask(&self.writable_mappings, file).map_err(kernel("cannot ask for the mappings"))?;
        Ok(u32::try_from(answer).ok().and_then(|answer| answer.checked_sub(1)))
    }

    /// The counters.
    pub fn counters(&self) -> Result<Counters, CaptureError> {
        let mut bytes = vec![0; self.cpus * size_of::<Counters>()];
        sys::lookup(self.counters.as_fd(), &0u32, &mut bytes).map_err(kernel("cannot read the counters"))?;
        let mut sum = Counters::default();
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            sum.0[i % counter::COUNT as usize] += u64::from_ne_bytes(value);
        }
        Ok(sum)
    }

    /// How often each probe was left out because it ran already on that CPU. A rise is a loss of
    /// unknown objects.
    pub fn recursion_misses(&self) -> Result<Vec<(&'static str, u64)>, CaptureError> {
        self.programs
            .iter()
            .map(|(name, fd)| Ok((*name, sys::recursion_misses(fd.as_fd())?)))
            .collect::<io::Result<_>>()
            .map_err(kernel("cannot read the state of the probes"))
    }

    /// What the probes log goes into the agent's log.
    pub fn forward_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.forward();
        }
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Where the probes are pinned.
    #[must_use]
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }
}

/// What a probe that is attached to nothing says of an open file.
pub(super) fn ask(query: &OwnedFd, file: BorrowedFd<'_>) -> io::Result<i32> {
    sys::run(query.as_fd(), u64::from(file.as_raw_fd().cast_unsigned()))
}

pub(super) fn link_name(program: &str) -> String {
    format!("link_{program}")
}

fn load_pinned(
    options: &LoadOptions,
    types: &btf::KernelTypes,
    offsets: &Offsets,
    settings: &Settings,
) -> Result<Ebpf, CaptureError> {
    let kernel_btf = Btf::parse_file(&options.btf, aya::Endianness::default())
        .map_err(|error| CaptureError::NoBtf { path: options.btf.clone(), reason: error.to_string() })?;
    let mut ebpf = EbpfLoader::new()
        .btf(Some(&kernel_btf))
        .override_global("OFFSETS", words(offsets), true)
        .override_global("SETTINGS", words(settings), true)
        .override_global(log::LEVEL, &options.log, true)
        .map_max_entries("RING", options.ring_bytes)
        .load(OBJECT)
        .map_err(|error| load_error("(maps)", &error))?;
    let mut names: Vec<(&str, &str)> = PROGRAMS.map(|name| (name, name)).to_vec();
    if offsets.task_io_uring != 0 {
        for (name, tracepoints) in uring::PROGRAMS {
            names.push((name, uring::tracepoint(types, tracepoints)?));
        }
    }
    for (name, trace) in &names {
        tracepoint(&mut ebpf, name)?.load(trace, &kernel_btf).map_err(|error| refused(name, &error))?;
    }
    match tracepoint(&mut ebpf, DIRTIED)?.load(DIRTIED, &kernel_btf) {
        Ok(()) => names.push((DIRTIED, DIRTIED)),
        Err(error) => tracing::info!("mapped files are read whole: {}", refused(DIRTIED, &error)),
    }
    let others = options.foreign && foreign::load(&mut ebpf, types, &kernel_btf);
    if others {
        names.extend(foreign::PROGRAMS.map(|name| (name, name)));
    }
    for name in QUERIES {
        let query: &mut RawTracePoint =
            program(&mut ebpf, name)?.try_into().map_err(|error: ProgramError| refused(name, &error))?;
        query.load().map_err(|error| refused(name, &error))?;
        query.pin(options.pin_dir.join(name)).map_err(|error| pin_failed("probe", name, error))?;
    }
    for name in MAPS {
        let map = ebpf.map(name).ok_or_else(|| missing(name))?;
        map.pin(options.pin_dir.join(name)).map_err(|error| pin_failed("map", name, error))?;
    }
    let meta = sys::open_pin(&options.pin_dir.join("META")).map_err(kernel("cannot open META"))?;
    let value = [u64::from(ABI_VERSION), u64::from(options.ring_bytes), 0, u64::from(std::process::id())];
    sys::update(meta.as_fd(), &0u32, &value, 0).map_err(kernel("cannot write META"))?;
    foreign::tell_roots(&options.pin_dir, &options.roots)?;
    for (name, _) in &names {
        let program = tracepoint(&mut ebpf, name)?;
        program.pin(options.pin_dir.join(name)).map_err(|error| pin_failed("probe", name, error))?;
        // While no file is mapped nobody is to pay for it.
        if *name == DIRTIED {
            continue;
        }
        let link =
            program.attach().and_then(|id| program.take_link(id)).map_err(|error| refused(name, &error))?;
        FdLink::from(link)
            .pin(options.pin_dir.join(link_name(name)))
            .map_err(|error| pin_failed("link", name, error))?;
    }
    Ok(ebpf)
}

pub(super) fn tracepoint<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint, CaptureError> {
    program(ebpf, name)?.try_into().map_err(|error: ProgramError| refused(name, &error))
}

fn pin_failed(
    what: &str,
    name: &str,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> CaptureError {
    kernel(format!("cannot pin the {what} {name}"))(io::Error::other(error))
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program, CaptureError> {
    ebpf.program_mut(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> CaptureError {
    CaptureError::Load {
        program: name.to_owned(),
        reason: "it is not in the object that this program was built with".to_owned(),
        log: String::new(),
    }
}

/// A struct of the ABI as the slice of words that a global is set from.
fn words<T>(value: &T) -> &[u32] {
    assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() == 4);
    // SAFETY: called for the two structs of u32 (and i32) without padding; size and alignment
    // were checked.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>() / 4) }
}

fn load_error(what: &str, error: &EbpfError) -> CaptureError {
    if is_permission(error) {
        return CaptureError::NotRoot;
    }
    CaptureError::Load { program: what.to_owned(), reason: chain(error), log: String::new() }
}

pub(super) fn refused(name: &str, error: &ProgramError) -> CaptureError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().collect();
            CaptureError::Load {
                program: name.to_owned(),
                reason: io_error.to_string(),
                log: lines[lines.len().saturating_sub(30)..].join("\n"),
            }
        }
        other => CaptureError::Load { program: name.to_owned(), reason: chain(other), log: String::new() },
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

fn is_permission(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::PermissionDenied) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Links first: then nothing runs any more.
fn remove_pins(pin_dir: &Path) -> io::Result<()> {
    let attached = || {
        PROGRAMS
            .into_iter()
            .chain(uring::PROGRAMS.map(|program| program.0))
            .chain([DIRTIED])
            .chain(foreign::PROGRAMS)
    };
    let names = attached().map(link_name);
    let names = names.chain(attached().chain(QUERIES).chain(MAPS).map(str::to_owned));
    for name in names {
        match fs::remove_file(pin_dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir(pin_dir)
}
