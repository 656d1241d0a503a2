//! A cut of the primary's power: its disk as it was at a moment, without what was not written to it yet.

use std::fs;
use std::process::Command;

use anyhow::Result;

use super::{World, command_ok};

impl World {
    /// The power of the primary fails now, as seen from its disk, which is that of [`World::mount_ext4`]. The
    /// world goes on until [`World::power_returns`].
    ///
    /// # Errors
    /// When the disk cannot be copied.
    pub fn power_fails(&self) -> Result<()> {
        fs::copy(self.root().join("image"), self.root().join("image.cut"))?;
        Ok(())
    }

    /// The primary stands again, with its disk as it was when the power failed. Program and agent have ended.
    ///
    /// # Errors
    /// When the disk cannot be mounted.
    pub fn power_returns(&mut self) -> Result<()> {
        command_ok(Command::new("umount").arg(&self.place.data))?;
        let image = self.root().join("image");
        fs::rename(self.root().join("image.cut"), &image)?;
        command_ok(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&self.place.data))?;
        for mark in ["ready", "stop"] {
            fs::remove_file(self.place.aux.join(mark))?;
        }
        Ok(())
    }
}
