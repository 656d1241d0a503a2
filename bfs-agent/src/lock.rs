//! The lock of what has one owner at a time: a store, a spool, a group's socket. It goes with its owner, also when
//! that is killed.

use std::fs::File;
use std::io;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// An exclusive lock (flock(2)) on an open file.
///
/// It ends when this is dropped, and not only when the last copy of the descriptor is closed: a child that another
/// thread has just forked has one until its exec.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Takes it, or gives the file back if somebody else has it.
    ///
    /// # Errors
    /// What the system says.
    pub fn take(file: File) -> io::Result<Result<Self, File>> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Ok(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(Err(file)),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes it, and waits for whoever has it.
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(file: File) -> io::Result<Self> {
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The file that is locked.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Should that fail, it ends with the descriptor.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::Lock;

    #[test]
    fn it_ends_with_its_owner_whoever_has_a_copy_of_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::create(dir.path().join("lock")).unwrap();
        let lock = Lock::take(open()).unwrap().unwrap();
        let copy = lock.file().try_clone().unwrap();
        assert!(Lock::take(open()).unwrap().is_err());
        drop(lock);
        assert!(Lock::take(open()).unwrap().is_ok());
        drop(copy);
    }
}
