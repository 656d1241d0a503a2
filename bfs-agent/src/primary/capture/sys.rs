//! The bpf(2) calls on maps, programs and pins, in one place.
//!
//! aya loads and attaches; after that everything is reached through the pins, so that an agent
//! that loaded and one that adopted take the same way.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Commands of bpf(2), `include/uapi/linux/bpf.h`.
mod command {
    pub const MAP_LOOKUP_ELEM: i64 = 1;
    pub const MAP_UPDATE_ELEM: i64 = 2;
    pub const MAP_DELETE_ELEM: i64 = 3;
    pub const OBJ_PIN: i64 = 6;
    pub const OBJ_GET: i64 = 7;
    pub const PROG_TEST_RUN: i64 = 10;
    pub const OBJ_GET_INFO_BY_FD: i64 = 15;
    pub const RAW_TRACEPOINT_OPEN: i64 = 17;
    pub const MAP_LOOKUP_AND_DELETE_BATCH: i64 = 25;
    pub const MAP_LOOKUP_BATCH: i64 = 24;
}

fn bpf<A>(command: i64, attr: &mut A) -> io::Result<i64> {
    // SAFETY: each attribute struct below is the head of `union bpf_attr` for its command, its
    // size is passed along, and the pointers in it are to memory of the sizes that the map has.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element(map: BorrowedFd<'_>, key: *const u8, value: *const u8, flags: u64) -> ElementAttr {
    ElementAttr {
        map: map.as_raw_fd().cast_unsigned(),
        reserved: 0,
        key: key.addr() as u64,
        value: value.addr() as u64,
        flags,
    }
}

/// Copies the value of `key` into `value`; whether it was there.
///
/// The caller passes a key and a value of the map's sizes (for a per-CPU map: of all CPUs).
pub fn lookup<K>(map: BorrowedFd<'_>, key: &K, value: &mut [u8]) -> io::Result<bool> {
    let mut attr = element(map, std::ptr::from_ref(key).cast(), value.as_mut_ptr(), 0);
    match bpf(command::MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// `BPF_NOEXIST`: only if the key is not there yet.
pub const NO_EXIST: u64 = 1;

/// Sets the value of `key`, both of the map's sizes.
pub fn update<K, V>(map: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> io::Result<()> {
    let mut attr = element(map, std::ptr::from_ref(key).cast(), std::ptr::from_ref(value).cast(), flags);
    bpf(command::MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes `key`; whether it was there.
pub fn delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = element(map, std::ptr::from_ref(key).cast(), std::ptr::null(), 0);
    match bpf(command::MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// All entries of a hash map of at most `entries` entries; `take` removes them as well.
///
/// A batch copies a whole bucket under its lock (kernel/bpf/hashtab.c,
/// `__htab_map_lookup_and_delete_batch`), so what is there all the time is seen exactly once,
/// which walking by key does not promise.
pub fn entries<K: Copy + Default, V: Copy + Default>(
    map: BorrowedFd<'_>,
    entries: u32,
    take: bool,
) -> io::Result<Vec<(K, V)>> {
    let command = if take { command::MAP_LOOKUP_AND_DELETE_BATCH } else { command::MAP_LOOKUP_BATCH };
    let mut size = 256.min(entries);
    let mut found = Vec::new();
    let (mut position, mut next) = (0u32, 0u32);
    let mut first = true;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        keys.resize(size as usize, K::default());
        values.resize(size as usize, V::default());
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { (&raw mut position).addr() as u64 },
            out_batch: (&raw mut next).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: size,
            map: map.as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        let result = bpf(command, &mut attr);
        let end = match &result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket holds more than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && size < entries => {
                size = entries.min(size * 8);
                continue;
            }
            Err(_) => return Err(result.err().unwrap_or_else(io::Error::last_os_error)),
        };
        let count = (attr.count as usize).min(keys.len());
        found.extend(keys[..count].iter().copied().zip(values[..count].iter().copied()));
        if end {
            return Ok(found);
        }
        position = next;
        first = false;
    }
}

/// The one value of the map `META`.
pub fn read_meta(map: BorrowedFd<'_>) -> io::Result<[u64; 4]> {
    let mut bytes = [0u8; 32];
    lookup(map, &0u32, &mut bytes)?;
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    Ok(words)
}

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct TracepointAttr {
    name: u64,
    program: u32,
    reserved: u32,
}

/// Attaches a program to the BTF tracepoint that it was loaded for, for as long as `path` stands, where the link is
/// pinned.
pub fn attach_pinned(program: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let program = program.as_raw_fd().cast_unsigned();
    let link = bpf(command::RAW_TRACEPOINT_OPEN, &mut TracepointAttr { name: 0, program, reserved: 0 })?;
    let link = made(link)?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = link.as_raw_fd().cast_unsigned();
    bpf(command::OBJ_PIN, &mut PathAttr { path: path.as_ptr().addr() as u64, fd, flags: 0 }).map(drop)
}

/// A descriptor that a command gave.
fn made(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens what is pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = PathAttr { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    made(bpf(command::OBJ_GET, &mut attr)?)
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

fn info<T>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        fd: fd.as_raw_fd().cast_unsigned(),
        len: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(info).addr() as u64,
    };
    bpf(command::OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct RunAttr {
    program: u32,
    result: u32,
    sizes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_size: u32,
    context_size_out: u32,
    context: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    reserved: u32,
}

/// Runs a raw tracepoint program that is attached to nothing, in this task, with an argument;
/// gives what it returns.
pub fn run(program: BorrowedFd<'_>, argument: u64) -> io::Result<i32> {
    let context = [argument];
    let mut attr = RunAttr {
        program: program.as_raw_fd().cast_unsigned(),
        context_size: 8,
        context: context.as_ptr().addr() as u64,
        ..RunAttr::default()
    };
    bpf(command::PROG_TEST_RUN, &mut attr)?;
    Ok(attr.result.cast_signed())
}

/// `max_entries` of a map.
pub fn max_entries(map: BorrowedFd<'_>) -> io::Result<u32> {
    // The head of struct bpf_map_info: type, id, key_size, value_size, max_entries.
    let mut words = [0u32; 5];
    info(map, &mut words)?;
    Ok(words[4])
}

/// How often a program was left out because it ran already on that CPU.
pub fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    // The head of struct bpf_prog_info; recursion_misses is its 27th word of 8 bytes.
    let mut words = [0u64; 27];
    info(program, &mut words)?;
    Ok(words[26])
}

/// Bytes of a page.
pub fn page_size() -> usize {
    // SAFETY: takes no memory; the answer for this name is always there.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
