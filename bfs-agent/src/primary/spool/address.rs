//! What a spool says about itself, so that it can be sent when nobody remembers its session.

use std::fs;
use std::path::{Path, PathBuf};

use bfs_common::record::{Epoch, GroupId};
use serde::{Deserialize, Serialize};

use super::{SpoolError, failed};
use crate::durable;
use crate::keys::Folder;
use crate::primary::ship::Sending;

const NAME: &str = "address";
/// 1 had the file of a secret instead of `keys`.
const FORMAT: u32 = 2;
/// The oldest that is understood.
const FORMAT_OLDEST: u32 = 1;

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
    /// The folder of keys.
    #[serde(default)]
    pub keys: Folder,
    /// FROM=TO of `--map`.
    pub maps: Vec<(PathBuf, PathBuf)>,
    /// How they are to travel.
    #[serde(default)]
    pub sending: Sending,
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
            keys: Folder::default(),
            maps: Vec::new(),
            sending: Sending::default(),
            boot_id,
            epoch: Epoch(0),
        }
    }

    /// Writes it whole or not at all, durably.
    pub(super) fn write(&self, dir: &Path) -> Result<(), SpoolError> {
        let path = dir.join(NAME);
        let write = || durable::replace(&path, &serde_json::to_vec_pretty(self)?);
        write().map_err(failed("write", &path))
    }

    /// # Errors
    /// What the system says, or that it is not understood.
    pub(super) fn read(dir: &Path) -> Result<Self, SpoolError> {
        let path = dir.join(NAME);
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        let bad = |why: String| SpoolError::Address { path: path.clone(), why };
        let address: Self = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if !(FORMAT_OLDEST..=FORMAT).contains(&address.format) {
            return Err(bad(format!("has format {}, this release knows {FORMAT}", address.format)));
        }
        Ok(Self { format: FORMAT, ..address })
    }

    pub(super) fn remove(dir: &Path) {
        for name in [NAME, "address.new"] {
            let _ = fs::remove_file(dir.join(name));
        }
    }
}
