//! The consumer of the ring.
//!
//! aya's consumer gives space back as it reads; here reading and releasing are two things, because
//! space is released only when what was read is safe elsewhere. What was read and not released
//! is read again by a successor: the kernel's consumer position is where it starts.
//!
//! Layout (`kernel/bpf/ringbuf.c`): one page with the consumer position, writable; one page with
//! the producer position and the data twice in a row, read-only. A record is a header of 8 bytes
//! (length with two flag bits, page offset) and the bytes, aligned to 8.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use bfs_common::abi::Event;

use super::sys;

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER: u64 = 8;

/// A mapping that is undone at the end.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, len: usize, offset: usize, protection: i32) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { start, len })
    }

    /// The position at the start of the mapping.
    fn position(&self) -> &AtomicU64 {
        // SAFETY: both kinds of mapping start with an aligned unsigned long, which lives as long
        // as the mapping and is only touched atomically.
        unsafe { self.start.cast::<AtomicU64>().as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The consumer's side of the ring.
pub struct Ring {
    consumer: Mapping,
    producer: Mapping,
    /// Where the data starts in `producer`.
    data: usize,
    capacity: u64,
    /// What is read next.
    position: u64,
    fd: OwnedFd,
}

/// A record, in place in the ring.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a>(&'a [u8]);

impl<'a> Record<'a> {
    /// The bytes of the record; the probes reserve in size classes, so not all of them count.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.0
    }

    /// The record taken apart; `None` if it is malformed.
    #[must_use]
    pub fn event(&self) -> Option<Event<'a>> {
        Event::parse(self.0)
    }
}

impl Ring {
    /// Maps the ring behind `fd`; reading begins at what was not released.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let capacity = sys::max_entries(fd.as_fd())? as usize;
        let page = sys::page_size();
        let consumer = Mapping::new(fd.as_fd(), page, 0, libc::PROT_READ | libc::PROT_WRITE)?;
        let producer = Mapping::new(fd.as_fd(), page + 2 * capacity, page, libc::PROT_READ)?;
        let position = consumer.position().load(Ordering::Acquire);
        Ok(Self { consumer, producer, data: page, capacity: capacity as u64, position, fd })
    }

    /// The next record and the position behind it, to be handed to [`Ring::release`] when the
    /// record is safe elsewhere. `None` if there is none yet.
    #[expect(clippy::should_implement_trait, reason = "the record borrows from the ring")]
    pub fn next(&mut self) -> Option<(Record<'_>, u64)> {
        loop {
            // Pairs with the kernel's release in bpf_ringbuf_reserve.
            let end = self.producer.position().load(Ordering::Acquire);
            if self.position >= end {
                return None;
            }
            let start = self.data + (self.position & (self.capacity - 1)) as usize;
            // SAFETY: within the mapping, since positions are taken modulo the capacity; aligned to
            // 8; the kernel changes the word atomically when the record is submitted.
            let header = unsafe { self.producer.start.add(start).cast::<AtomicU32>().as_ref() };
            let header = header.load(Ordering::Acquire);
            if header & BUSY != 0 {
                return None;
            }
            let len = u64::from(header & !(BUSY | DISCARDED));
            self.position += (HEADER + len).next_multiple_of(8);
            if header & DISCARDED == 0 {
                // SAFETY: the record is whole (not busy), lies within the double mapping, and the
                // kernel does not write to it again before it is released, which needs `&mut self`.
                let bytes = unsafe {
                    std::slice::from_raw_parts(
                        self.producer.start.add(start + HEADER as usize).as_ptr(),
                        len as usize,
                    )
                };
                return Some((Record(bytes), self.position));
            }
        }
    }

    /// Gives the space before `position` back to the probes.
    ///
    /// # Panics
    /// If `position` was not read yet, or lies before what was released already.
    pub fn release(&mut self, position: u64) {
        let released = self.consumer.position().load(Ordering::Relaxed);
        assert!(released <= position && position <= self.position, "released out of order");
        self.consumer.position().store(position, Ordering::Release);
    }

    /// What is read next.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Where the probes write next; what was written before this call lies before it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.producer.position().load(Ordering::Acquire)
    }

    /// Bytes that were not read yet.
    #[must_use]
    pub fn pending_bytes(&self) -> u64 {
        self.end().saturating_sub(self.position)
    }

    /// Bytes that are in use: not released yet, read or not.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.end().saturating_sub(self.consumer.position().load(Ordering::Acquire))
    }

    /// Bytes that the ring holds.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
