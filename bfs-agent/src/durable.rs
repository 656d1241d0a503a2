//! The calls after which something is durable, in one place: log, spool, before-images and tree go through here.
//!
//! In the unit tests a simulated disk listens, which loses what did not (`simulation::disk`).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The bytes of a file, and what is needed to read them.
///
/// # Errors
/// What the system says; then nothing since the last success counts.
pub fn data(file: &File) -> io::Result<()> {
    #[cfg(test)]
    crate::simulation::disk::sync_file(file)?;
    file.sync_data()
}

/// The bytes of a file and its attributes.
///
/// # Errors
/// As [`data`].
pub fn file(file: &File) -> io::Result<()> {
    #[cfg(test)]
    crate::simulation::disk::sync_file(file)?;
    file.sync_all()
}

/// The entries of a directory.
///
/// # Errors
/// As [`data`].
pub fn directory(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    crate::simulation::disk::sync_directory(path)?;
    File::open(path)?.sync_all()
}

/// Everything of the file system that a descriptor lies on.
///
/// # Errors
/// As [`data`]; also when something was lost since the descriptor was opened.
pub fn file_system(fd: &OwnedFd) -> io::Result<()> {
    #[cfg(test)]
    crate::simulation::disk::sync_all(fd)?;
    Ok(rustix::fs::syncfs(fd)?)
}
