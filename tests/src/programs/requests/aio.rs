//! AIO by its system calls; completions are taken from the ring that the kernel maps for it.

use std::cell::OnceCell;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail, ensure};

use super::{Files, PIECE, PIECES, SLOTS};

/// `struct iocb` (include/uapi/linux/aio_abi.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

const PWRITE: u16 = 1;
const PWRITEV: u16 = 8;

/// The head of `struct aio_ring` (fs/aio.c), before the events of 32 bytes each.
#[repr(C)]
struct Ring {
    id: u32,
    number: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat: u32,
    incompat: u32,
    header: u32,
}

thread_local! {
    static CONTEXT: OnceCell<u64> = const { OnceCell::new() };
}

fn context() -> Result<u64> {
    CONTEXT.with(|cell| {
        if let Some(context) = cell.get() {
            return Ok(*context);
        }
        let mut context = 0u64;
        // SAFETY: the kernel writes one word.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, 64, &raw mut context) };
        ensure!(made == 0, "io_setup: {}", std::io::Error::last_os_error());
        Ok(*cell.get_or_init(|| context))
    })
}

/// Hands operations in and waits for all of them.
fn run(iocbs: &mut [Iocb]) -> Result<()> {
    let context = context()?;
    let mut list: Vec<*mut Iocb> = iocbs.iter_mut().map(std::ptr::from_mut).collect();
    // SAFETY: the list and what it points to live until all completions were seen.
    let submitted = unsafe { libc::syscall(libc::SYS_io_submit, context, list.len(), list.as_mut_ptr()) };
    ensure!(submitted == list.len() as i64, "io_submit: {submitted}, {}", std::io::Error::last_os_error());
    // SAFETY: the context's number is the address of its ring, which stays mapped.
    let ring = unsafe { &*(context as *const Ring) };
    for _ in 0..list.len() {
        let head = ring.head.load(Ordering::Relaxed);
        while ring.tail.load(Ordering::Acquire) == head {
            std::thread::yield_now();
        }
        // SAFETY: as above; the event at the head is complete, its result is the third word.
        let result = unsafe {
            let event = (context as *const u8).add(ring.header as usize + head as usize * 32);
            event.cast::<i64>().add(2).read()
        };
        ring.head.store((head + 1) % ring.number, Ordering::Release);
        if result <= 0 {
            bail!("an operation ended with {result}");
        }
    }
    Ok(())
}

/// The pieces of a round, every other one by a vector, and its line.
pub(super) fn round(files: &mut Files, round: u64) -> Result<()> {
    let at = (round % SLOTS) as usize * PIECES * PIECE;
    let fd = files.blocks.as_raw_fd() as u32;
    let memory = files.memory.bytes().as_ptr();
    let vectors: Vec<libc::iovec> = (0..PIECES)
        .map(|piece| libc::iovec {
            iov_base: memory.wrapping_add(piece * PIECE).cast_mut().cast(),
            iov_len: PIECE,
        })
        .collect();
    let mut iocbs: Vec<Iocb> = (0..PIECES)
        .map(|piece| {
            let plain = Iocb {
                opcode: PWRITE,
                fd,
                buffer: vectors[piece].iov_base as u64,
                bytes: PIECE as u64,
                offset: (at + piece * PIECE) as i64,
                ..Iocb::default()
            };
            if piece % 2 == 0 {
                plain
            } else {
                let vector = &raw const vectors[piece] as u64;
                Iocb { opcode: PWRITEV, buffer: vector, bytes: 1, ..plain }
            }
        })
        .collect();
    run(&mut iocbs)?;
    let line = round.to_le_bytes();
    run(&mut [Iocb {
        opcode: PWRITE,
        fd: files.lines.as_raw_fd() as u32,
        buffer: line.as_ptr() as u64,
        bytes: 8,
        ..Iocb::default()
    }])
}
