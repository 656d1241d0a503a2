//! What a spool says about itself, so that it can be sent when nobody remembers its session.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bfs_common::record::{Epoch, GroupId};
use serde::{Deserialize, Serialize};

use super::{SpoolError, failed};
use crate::durable;
use crate::log::sync_dir;

const NAME: &str = "address";
const FORMAT: u32 = 1;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    format: u32,
    /// Name of the group.
    pub group: String,
    /// Its identity.
    pub group_id: GroupId,
    /// Where the backup is, as given to `--backup`.
    pub backup: String,
    /// The file of the shared secret.
    pub secret_file: Option<PathBuf>,
    /// FROM=TO of `--map`.
    pub maps: Vec<(PathBuf, PathBuf)>,
    /// The boot that the records are of.
    pub boot_id: [u8; 16],
    /// The epoch that they are of.
    pub epoch: Epoch,
}

impl Address {
    /// For records of a session that has no epoch yet.
    #[must_use]
    pub fn new(group: &str, group_id: GroupId, boot_id: [u8; 16]) -> Self {
        Self {
            format: FORMAT,
            group: group.into(),
            group_id,
            backup: String::new(),
            secret_file: None,
            maps: Vec::new(),
            boot_id,
            epoch: Epoch(0),
        }
    }

    /// Writes it whole or not at all, durably.
    pub(super) fn write(&self, dir: &Path) -> Result<(), SpoolError> {
        let path = dir.join(NAME);
        let new = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            durable::file(&file)?;
            fs::rename(&new, &path)
        };
        write().map_err(failed("write", &path))?;
        Ok(sync_dir(dir)?)
    }

    /// # Errors
    /// What the system says, or that it is not understood.
    pub(super) fn read(dir: &Path) -> Result<Self, SpoolError> {
        let path = dir.join(NAME);
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        let bad = |why: String| SpoolError::Address { path: path.clone(), why };
        let address: Self = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if address.format != FORMAT {
            return Err(bad(format!("has format {}, this release knows {FORMAT}", address.format)));
        }
        Ok(address)
    }

    pub(super) fn remove(dir: &Path) {
        for name in [NAME, "address.new"] {
            let _ = fs::remove_file(dir.join(name));
        }
    }
}
