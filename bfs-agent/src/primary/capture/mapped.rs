//! The map `MAPPED`: files that a process may store into through a mapping. Of some of them the probes record
//! the pages that become dirty; all of them a successor finds here.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use bfs_common::abi::{InodeId, MAPPED_MAX};

use super::{CaptureError, sys};

/// See the module.
pub struct MappedFiles {
    map: OwnedFd,
    /// The probe looks at nothing while the map is empty: `META` says so.
    meta: OwnedFd,
    count: usize,
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::Kernel { what: what.to_owned(), source }
}

impl MappedFiles {
    /// The open map, with what is in it.
    pub(super) fn new(map: OwnedFd, meta: OwnedFd) -> Result<Self, CaptureError> {
        let mut this = Self { map, meta, count: 0 };
        this.count = this.all()?.len();
        Ok(this)
    }

    /// Keeps in mind that a file is mapped, and records from now on which of its pages become dirty, if
    /// `pages` says so. `false` where there is no room for it.
    pub fn follow(&mut self, file: InodeId, pages: bool) -> Result<bool, CaptureError> {
        let value = u32::from(pages);
        match sys::update(self.map.as_fd(), &file, &value, sys::NO_EXIST) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                sys::update(self.map.as_fd(), &file, &value, 0)
            }
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => return Ok(false),
            Err(error) => Err(error),
            Ok(()) => self.set_count(self.count + 1),
        }
        .map_err(failed("cannot note that a file is mapped"))?;
        Ok(true)
    }

    /// The file is not mapped any more.
    pub fn forget(&mut self, file: InodeId) -> Result<(), CaptureError> {
        sys::delete(self.map.as_fd(), &file)
            .and_then(|there| if there { self.set_count(self.count.saturating_sub(1)) } else { Ok(()) })
            .map_err(failed("cannot let go of a mapped file"))
    }

    /// The files that were noted as mapped.
    pub fn all(&self) -> Result<Vec<InodeId>, CaptureError> {
        let files: Vec<(InodeId, u32)> = sys::entries(self.map.as_fd(), MAPPED_MAX, false)
            .map_err(failed("cannot read which files are mapped"))?;
        Ok(files.into_iter().map(|f| f.0).collect())
    }

    fn set_count(&mut self, count: usize) -> io::Result<()> {
        let gate = (self.count == 0) != (count == 0);
        self.count = count;
        if gate {
            let mut meta = sys::read_meta(self.meta.as_fd())?;
            meta[2] = u64::from(count > 0);
            sys::update(self.meta.as_fd(), &0u32, &meta, 0)?;
        }
        Ok(())
    }
}
