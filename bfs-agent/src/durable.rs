//! The calls after which something is durable, in one place: log, spool, before-images and tree go through here.
//!
//! In the unit tests a simulated disk listens, which loses what did not (`simulation::disk`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
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

/// Writes a small file of mode 0600: whoever looks, also after a crash, finds the file as it was before or as it is now.
///
/// # Errors
/// What the system says; then it is as it was before, or as it is to be and perhaps not durable.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = path.with_file_name(name);
    // One that is left of a crash, or that somebody put there, is not written to.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    written.write_all(bytes)?;
    file(&written)?;
    fs::rename(&new, path)?;
    directory(path.parent().unwrap_or(path))
}
