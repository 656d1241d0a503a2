//! For measurements of going back: a tree of 1 GiB, and programs that change 10 MiB of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;

use crate::random::Random;

/// Files of the tree, in folders of 32.
const FILES: usize = 1024;
/// Bytes of each.
const FILE_BYTES: usize = 1 << 20;
/// Bytes of a page.
const PAGE: usize = 4096;
/// Bytes that are changed in each of some files.
const PIECE: usize = 25 * PAGE;

fn path(data: &Path, file: usize) -> std::path::PathBuf {
    data.join(format!("d{:02}/f{file:04}", file / 32))
}

fn bytes(random: &mut Random, buffer: &mut [u8]) {
    for word in buffer.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_ne_bytes());
    }
}

/// Makes the tree.
///
/// # Errors
/// When a file cannot be written.
pub fn make(data: &Path) -> Result<()> {
    let mut random = Random::new(1);
    let mut buffer = vec![0; FILE_BYTES];
    for file in 0..FILES {
        let path = path(data, file);
        if file % 32 == 0 {
            fs::create_dir_all(path.parent().expect("it stands in a folder"))?;
        }
        bytes(&mut random, &mut buffer);
        fs::write(path, &buffer)?;
    }
    Ok(())
}

/// Changes so many pages, one by one, anywhere.
///
/// # Errors
/// When a file cannot be written.
pub fn pages(data: &Path, count: usize) -> Result<()> {
    let mut random = Random::new(2);
    let mut buffer = [0; PAGE];
    for _ in 0..count {
        let file = File::options().write(true).open(path(data, random.below(FILES)))?;
        bytes(&mut random, &mut buffer);
        file.write_all_at(&buffer, (random.below(FILE_BYTES / PAGE) * PAGE) as u64)?;
    }
    Ok(())
}

/// Changes 100 KiB in each of so many files.
///
/// # Errors
/// When a file cannot be written.
pub fn files(data: &Path, count: usize) -> Result<()> {
    let mut random = Random::new(3);
    let mut buffer = vec![0; PIECE];
    for n in 0..count {
        let file = File::options().write(true).open(path(data, n * FILES / count))?;
        bytes(&mut random, &mut buffer);
        file.write_all_at(&buffer, (random.below((FILE_BYTES - PIECE) / PAGE) * PAGE) as u64)?;
    }
    Ok(())
}
