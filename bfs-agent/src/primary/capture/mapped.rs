//! The map `MAPPED`: files that a process may store into through a mapping. Of some of them the probes record
//! the pages that become dirty; all of them a successor finds here.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use bfs_common::abi::{InodeId, MAPPED_MAX};

use super::{CaptureError, sys};

/// See the module.
pub struct MappedFiles {
    map: OwnedFd,
    /// The probe of dirty pages, which is attached only while there is a file in the map, and where its link is
    /// pinned then. `None`: the kernel has no such tracepoint.
    probe: Option<(OwnedFd, PathBuf)>,
    count: usize,
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::Kernel { what: what.to_owned(), source }
}

impl MappedFiles {
    /// The open map, with what is in it.
    pub(super) fn new(map: OwnedFd, probe: Option<(OwnedFd, PathBuf)>) -> Result<Self, CaptureError> {
        let mut this = Self { map, probe, count: 0 };
        let there = this.all()?.len();
        this.set_count(there).map_err(failed("cannot attach the probe of dirty pages"))?;
        Ok(this)
    }

    /// Whether pages that become dirty are recorded.
    #[must_use]
    pub fn records_pages(&self) -> bool {
        self.probe.is_some()
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

    /// How many files there are in the map from now on.
    fn set_count(&mut self, count: usize) -> io::Result<()> {
        if let Some((probe, link)) = &self.probe {
            match (link.exists(), count > 0) {
                (false, true) => sys::attach_pinned(probe.as_fd(), link)?,
                (true, false) => fs::remove_file(link)?,
                _ => {}
            }
        }
        self.count = count;
        Ok(())
    }
}
