//! Process state that comes from a backup: written beside the images of the group by `bfs-replayer promote`, and restored by
//! `bfs-agent run --restore`, once.
//!
//! A set stands under its name only when it is durable as a whole. Before anything of it runs it gets another name: what ran
//! once has changed files, and must not begin again on them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bfs_common::record::CheckpointId;

use super::numbers::{behind, numbers};
use super::{Images, ImagesError, OUTSIDE, Origin, Outside, folder, other};
use crate::durable;

/// Where the processes of a group stand that was promoted.
#[must_use]
pub fn export_folder(directory: &Path, group: &str) -> PathBuf {
    let mut name = folder(directory, group).into_os_string();
    name.push(".promoted");
    name.into()
}

/// Whose state is in a folder.
///
/// # Errors
/// What the file system said, or that there is none in it.
pub fn origin(images: &Path) -> io::Result<Origin> {
    Outside::read(&images.join(OUTSIDE)).map(|outside| outside.of)
}

/// Writes a set.
#[derive(Debug)]
pub struct Export {
    to: PathBuf,
    new: PathBuf,
    file: Option<(String, File)>,
}

impl Export {
    /// Begins; what stands there goes.
    ///
    /// # Errors
    /// What the file system said.
    pub fn begin(to: &Path) -> io::Result<Self> {
        let new = to.with_extension("promoted.new");
        for old in [to, &new] {
            match fs::remove_dir_all(old) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&new)?;
        Ok(Self { to: to.into(), new, file: None })
    }

    /// More bytes of a file; one comes after the other.
    ///
    /// # Errors
    /// What the file system said.
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        if self.file.as_ref().is_none_or(|(open, _)| open != name) {
            self.sync()?;
            let mut options = OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o600).open(self.new.join(name))?;
            self.file = Some((name.to_owned(), file));
        }
        self.file.as_mut().map_or(Ok(()), |(_, file)| file.write_all(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.take().map_or(Ok(()), |(_, file)| durable::data(&file))
    }

    /// It is complete.
    ///
    /// # Errors
    /// What the file system said, or that it is no set.
    pub fn end(mut self) -> io::Result<Origin> {
        self.sync()?;
        let origin = origin(&self.new)?;
        durable::directory(&self.new)?;
        fs::rename(&self.new, &self.to)?;
        durable::directory(self.to.parent().unwrap_or(&self.to))?;
        Ok(origin)
    }
}

impl Images {
    /// Makes processes that come from a backup; `select` as in [`Images::restore`].
    ///
    /// # Errors
    /// [`ImagesError`]: nothing of them has run, and it may be tried again.
    pub fn restore_promoted(
        &mut self,
        from: &Path,
        select: impl FnOnce() -> Result<(), String>,
    ) -> Result<CheckpointId, ImagesError> {
        let shown = from.display().to_string();
        let of = origin(from).map_err(other(shown.clone()))?;
        let above = behind(1, &numbers(from).map_err(other(shown.clone()))?);
        let own = self.of(of.checkpoint);
        // From here on it cannot be begun once more.
        let taken = fs::rename(from, &own).and_then(|()| durable::directory(&self.folder));
        taken.map_err(other(format!("rename {shown} to {}", own.display())))?;
        self.root = Some(of.root);
        let expected = self.contained().expect(of.root, above);
        let expected = expected.map_err(|e| ImagesError::Restore(of.checkpoint, e.to_string()));
        if let Err(e) = expected.and_then(|()| self.restore(of.checkpoint, select)) {
            // CRIU lets nothing run that it did not restore as a whole.
            fs::rename(&own, from).map_err(other(format!("rename {} back", own.display())))?;
            return Err(e);
        }
        self.tally.restored = 0;
        if let Err(e) = fs::remove_dir_all(&own) {
            tracing::warn!("cannot remove {}: {e}", own.display());
        }
        Ok(of.checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_there_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let to = export_folder(dir.path(), "g.h");
        assert_eq!(to, dir.path().join("g.h.promoted"));
        let mut export = Export::begin(&to).unwrap();
        export.put("core-2.img", b"a").unwrap();
        export.put("core-2.img", b"b").unwrap();
        export.put("pstree.img", b"magicmag").unwrap();
        assert!(!to.exists());
        let mut export = Export::begin(&to).unwrap();
        export.put("core-2.img", b"ab").unwrap();
        assert!(export.end().is_err(), "nobody knows whose it is");
        let mut export = Export::begin(&to).unwrap();
        export.put("core-2.img", b"ab").unwrap();
        export.put("core-17.img", b"").unwrap();
        let of = Origin { checkpoint: CheckpointId(7), root: 2, binds: vec![("/a".into(), "/b".into())] };
        let text = serde_json::json!({ "files": {}, "of": of }).to_string();
        export.put(OUTSIDE, text.as_bytes()).unwrap();
        assert_eq!(export.end().unwrap(), of);
        assert_eq!(origin(&to).unwrap(), of);
    }
}
