//! Makes a set of images stand alone whose memory was dumped ahead in part: destinations get it so, and know nothing of
//! rounds.
//!
//! `pagemap-ID.img` says of each run of pages of a process (or of a shared memory) whether it follows in `pages-N.img`, or
//! stands in the same image of the set that `parent` names (CRIU's `images/pagemap.proto`, `criu/pagemap.c`).

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use crate::primary::capture::page_size;

use super::protobuf::{MAGIC, entry, fields, put_entry, put_varint};

/// Where a set says of what it is the rest.
const PARENT: &str = "parent";
/// Bytes that are copied at once.
const CHUNK: usize = 1 << 20;

/// `pagemap_head.pages_id`
const PAGES_ID: u64 = 1;
/// Fields of `pagemap_entry`: `vaddr`, `compat_nr_pages`, `in_parent`, `flags`, `nr_pages`.
const VADDR: u64 = 1;
const NR_PAGES_32: u64 = 2;
const IN_PARENT: u64 = 3;
const FLAGS: u64 = 4;
const NR_PAGES: u64 = 5;
/// Bits of `flags` (`criu/include/pagemap.h`).
const PE_PARENT: u64 = 1;
const PE_PRESENT: u64 = 4;

/// Pages that follow each other.
struct Run {
    /// Address of the first one.
    at: u64,
    /// Bytes of all.
    length: u64,
    /// Where its pages stand in the set's own file, if they do.
    offset: u64,
    flags: u64,
    /// As it stands in the image.
    entry: Vec<u8>,
}

impl Run {
    fn of(entry: &[u8], page: u64) -> Option<Self> {
        let (mut at, mut pages_32, mut pages, mut in_parent, mut flags) = (None, None, None, false, None);
        for field in fields(entry)? {
            match field.number {
                VADDR => at = field.value,
                NR_PAGES_32 => pages_32 = field.value,
                IN_PARENT => in_parent = field.value == Some(1),
                FLAGS => flags = field.value,
                NR_PAGES => pages = field.value,
                _ => {}
            }
        }
        // As init_compat_pagemap_entry() has it.
        let flags = match (in_parent, flags) {
            (true, flags) => flags.unwrap_or(0) | PE_PARENT,
            (false, flags) => flags.unwrap_or(PE_PRESENT),
        };
        let length = pages.or(pages_32)?.checked_mul(page)?;
        let at = at?;
        at.checked_add(length)?;
        Some(Self { at, length, offset: 0, flags, entry: entry.to_vec() })
    }

    fn is(&self, bit: u64) -> bool {
        self.flags & bit != 0
    }

    /// The same with its pages in its own set.
    fn present(&self) -> Option<Vec<u8>> {
        let mut new = Vec::with_capacity(self.entry.len() + 2);
        for field in fields(&self.entry)? {
            if !matches!(field.number, IN_PARENT | FLAGS) {
                new.extend_from_slice(field.whole);
            }
        }
        put_varint(&mut new, FLAGS << 3);
        put_varint(&mut new, self.flags & !PE_PARENT | PE_PRESENT);
        Some(new)
    }
}

/// A `pagemap` image.
struct Map {
    magic: Vec<u8>,
    head: Vec<u8>,
    pages_id: u64,
    runs: Vec<Run>,
}

impl Map {
    fn parse(image: &[u8], page: u64) -> Option<Self> {
        let (magic, mut rest) = image.split_at_checked(MAGIC)?;
        let head = entry(&mut rest)?;
        let pages_id = fields(head)?.iter().find(|field| field.number == PAGES_ID)?.value?;
        let (mut runs, mut offset, mut end) = (Vec::new(), 0, 0);
        while !rest.is_empty() {
            let run = Run { offset, ..Run::of(entry(&mut rest)?, page)? };
            // They are in the order of their addresses.
            if run.at < end {
                return None;
            }
            end = run.at + run.length;
            if run.is(PE_PRESENT) && !run.is(PE_PARENT) {
                offset += run.length;
            }
            runs.push(run);
        }
        Some(Self { magic: magic.to_vec(), head: head.to_vec(), pages_id, runs })
    }

    fn has_parent(&self) -> bool {
        self.runs.iter().any(|run| run.is(PE_PARENT))
    }

    fn pages(&self) -> String {
        format!("pages-{}.img", self.pages_id)
    }
}

fn not_understood(path: &Path) -> io::Error {
    io::Error::other(format!("{} is not understood", path.display()))
}

/// The images of one name, in one set and those that it stands on.
struct Layers {
    map: Map,
    pages: File,
    below: Option<Box<Self>>,
}

impl Layers {
    fn open(set: &Path, name: &str, page: u64) -> io::Result<Self> {
        let path = set.join(name);
        let map = Map::parse(&fs::read(&path)?, page).ok_or_else(|| not_understood(&path))?;
        let pages = File::open(set.join(map.pages()))?;
        let below =
            if map.has_parent() { Some(Box::new(Self::open(&set.join(PARENT), name, page)?)) } else { None };
        Ok(Self { map, pages, below })
    }

    /// Writes `length` bytes from address `at` on.
    fn copy(&self, at: u64, length: u64, to: &mut File) -> io::Result<()> {
        let (mut at, end) = (at, at + length);
        while at < end {
            let runs = &self.map.runs;
            let run = runs[..runs.partition_point(|run| run.at <= at)].last();
            let run = run.filter(|run| at < run.at + run.length).ok_or_else(|| missing(at))?;
            let part = end.min(run.at + run.length) - at;
            match &self.below {
                Some(below) if run.is(PE_PARENT) => below.copy(at, part, to)?,
                _ if run.is(PE_PARENT) || !run.is(PE_PRESENT) => return Err(missing(at)),
                _ => copy_bytes(&self.pages, run.offset + (at - run.at), part, to)?,
            }
            at += part;
        }
        Ok(())
    }
}

fn missing(at: u64) -> io::Error {
    io::Error::other(format!("the page at {at:#x} is in no round"))
}

fn copy_bytes(from: &File, mut at: u64, mut length: u64, to: &mut File) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK.min(usize::try_from(length).unwrap_or(CHUNK))];
    while length > 0 {
        let part = &mut chunk[..usize::try_from(length).unwrap_or(CHUNK).min(CHUNK)];
        from.read_exact_at(part, at)?;
        to.write_all(part)?;
        at += part.len() as u64;
        length -= part.len() as u64;
    }
    Ok(())
}

/// The folder in a set where who has this number puts those of its images that do not stand alone.
pub(super) fn name(number: u32) -> String {
    format!("whole-{number}")
}

/// Where each image of a set stands alone: itself, or what is in the folder `whole`.
pub(super) fn image(set: &Path, whole: &str, name: &str) -> PathBuf {
    let whole = set.join(whole).join(name);
    if whole.exists() { whole } else { set.join(name) }
}

/// Removes the folder `whole` of a set.
///
/// # Errors
/// What the file system said.
pub(super) fn forget(set: &Path, whole: &str) -> io::Result<()> {
    match fs::remove_dir_all(set.join(whole)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Puts into the folder `whole` of a set those of its images that do not stand alone.
///
/// # Errors
/// What the file system said, or that an image is not understood.
pub(super) fn make(set: &Path, whole: &str) -> io::Result<()> {
    forget(set, whole)?;
    if !set.join(PARENT).exists() {
        return Ok(());
    }
    let page = page_size() as u64;
    let to = set.join(whole);
    DirBuilder::new().mode(0o700).create(&to)?;
    for found in fs::read_dir(set)? {
        let Ok(name) = found?.file_name().into_string() else { continue };
        if name.starts_with("pagemap-") {
            make_one(set, &name, page, &to)?;
        }
    }
    Ok(())
}

fn make_one(set: &Path, name: &str, page: u64, to: &Path) -> io::Result<()> {
    let layers = Layers::open(set, name, page)?;
    let Some(below) = &layers.below else { return Ok(()) };
    let map = &layers.map;
    let bad = || not_understood(&set.join(name));
    let mut image = map.magic.clone();
    put_entry(&mut image, &map.head).ok_or_else(bad)?;
    let mut pages = File::create_new(to.join(map.pages()))?;
    for run in &map.runs {
        if run.is(PE_PARENT) {
            put_entry(&mut image, &run.present().ok_or_else(bad)?).ok_or_else(bad)?;
            below.copy(run.at, run.length, &mut pages)?;
        } else {
            put_entry(&mut image, &run.entry).ok_or_else(bad)?;
            if run.is(PE_PRESENT) {
                copy_bytes(&layers.pages, run.offset, run.length, &mut pages)?;
            }
        }
    }
    fs::write(to.join(name), image)
}

#[cfg(test)]
mod tests;
