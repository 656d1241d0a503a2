//! A program that changes files at a steady rate, for measurements: writes at random places, appends, new files
//! that replace old ones, removals, attributes, directories; alone, so that no two of its calls race.
//!
//! With a mapping it also stores into a shared one all the time, which only a stop can settle.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Place;
use crate::random::Random;

const FILES: usize = 50;
const FILE_BYTES: usize = 64 << 10;
const MAPPED_BYTES: usize = 256 << 10;

/// Works below `place.data/work` until it is told to stop, at `rate` calls a second.
///
/// # Errors
/// What a call met.
pub fn run(place: &Place, rate: usize, mapped: bool) -> Result<()> {
    ensure!(rate > 0, "the rate must be above 0");
    let folder = place.data.join("work");
    fs::create_dir(&folder)?;
    let path = |n: usize| folder.join(format!("file-{n}"));
    let open = |n: usize| OpenOptions::new().write(true).create(true).truncate(false).open(path(n));
    let mut files = (0..FILES).map(open).collect::<Result<Vec<File>, _>>()?;
    let mut journal = OpenOptions::new().append(true).create(true).open(folder.join("journal"))?;
    let mut mapping = if mapped { Some(Mapping::new(&folder.join("mapped"))?) } else { None };
    let mut random = Random::new(1);
    let bytes = vec![7_u8; 8 << 10];
    place.ready()?;
    let (begun, mut made, mut round) = (Instant::now(), 0_u64, 0_usize);
    while !place.stopping() {
        // As many calls as the time that went by allows.
        while (made as f64) < begun.elapsed().as_secs_f64() * rate as f64 {
            made += one_step(&mut files, &mut journal, &mut random, &bytes, &path)?;
            if let Some(mapping) = &mut mapping {
                mapping.store(random.below(MAPPED_BYTES), made as u8);
            }
        }
        round += 1;
        if round % 1_000 == 0 {
            journal.set_len(0)?;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// One change; how many calls it took.
fn one_step(
    files: &mut [File],
    journal: &mut File,
    random: &mut Random,
    bytes: &[u8],
    path: &dyn Fn(usize) -> std::path::PathBuf,
) -> Result<u64> {
    let n = random.below(FILES);
    let length = 1 + random.below(bytes.len());
    Ok(match random.below(20) {
        0..=9 => {
            files[n].write_at(&bytes[..length], random.below(FILE_BYTES) as u64)?;
            1
        }
        10..=15 => {
            journal.write_all(&bytes[..length.min(200)])?;
            1
        }
        16 => {
            // A new one takes the place of the old one, as editors and databases do.
            let new = path(n).with_extension("new");
            files[n] = File::create(&new)?;
            files[n].write_all(&bytes[..length])?;
            fs::rename(&new, path(n))?;
            3
        }
        17 => {
            let short = path(n).with_extension("short");
            fs::write(&short, &bytes[..length])?;
            fs::remove_file(&short)?;
            4
        }
        18 => {
            files[n].set_permissions(fs::Permissions::from_mode(0o600 | (length as u32 & 0o77)))?;
            1
        }
        _ => {
            let directory = path(n).with_extension("d");
            fs::create_dir(&directory)?;
            fs::remove_dir(&directory)?;
            2
        }
    })
}

struct Mapping {
    start: *mut u8,
    _file: File,
}

impl Mapping {
    fn new(path: &std::path::Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(MAPPED_BYTES as u64)?;
        // SAFETY: a mapping of our own of a file of that length; it lasts as long as the process.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPED_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("no mapping");
        }
        Ok(Self { start: start.cast(), _file: file })
    }

    fn store(&mut self, at: usize, value: u8) {
        assert!(at < MAPPED_BYTES);
        // SAFETY: within the mapping.
        unsafe { self.start.add(at).write_volatile(value) };
    }
}
