//! A disk of its own for a store: ext4 on an image, behind a loop device. What reached the device stands in the
//! image, and nothing else: a copy of the image is what a power cut leaves.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use bfs_tests::faults::Faults;
use bfs_tests::random::Random;
use bfs_tests::world::command_ok;

/// Bytes of the image; all of it is copied at a cut.
const IMAGE_BYTES: u64 = 48 << 20;
/// In a hundred calls so often the kernel is taken to write a file back by itself.
const WRITES_BACK: usize = 6;

/// A mounted image.
pub struct Disk {
    image: PathBuf,
    mounted: PathBuf,
}

impl Disk {
    /// Makes one in a folder.
    pub fn new(folder: &Path) -> Self {
        let disk = Self { image: folder.join("image"), mounted: folder.join("disk") };
        File::create(&disk.image).unwrap().set_len(IMAGE_BYTES).unwrap();
        command_ok(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk.image)).unwrap();
        fs::create_dir(&disk.mounted).unwrap();
        disk.mount();
        disk
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mounted
    }

    fn mount(&self) {
        command_ok(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mounted)).unwrap();
    }

    fn cut(&self) -> PathBuf {
        self.image.with_extension("cut")
    }

    /// When a daemon of these halts, its disk is copied as it is. Before that the kernel may write back any
    /// file at any moment.
    pub fn cut_with(&self, faults: &Faults, seed: u64) {
        faults.at_halt(self.copying());
        let mut random = Random::new(seed);
        faults.at_call(move |path| {
            if random.chance(WRITES_BACK)
                && let Ok(file) = File::open(path)
                && file.metadata().is_ok_and(|meta| meta.is_file())
            {
                let _ = rustix::fs::fdatasync(&file);
            }
        });
    }

    /// Copies the image as it is.
    fn copying(&self) -> impl FnMut() + Send + 'static {
        let (image, cut, device) = (self.image.clone(), self.cut(), self.device());
        move || {
            // A copy counts if the device was at rest meanwhile.
            loop {
                let before = fs::read_to_string(&device).unwrap();
                fs::copy(&image, &cut).unwrap();
                if fs::read_to_string(&device).unwrap() == before {
                    return;
                }
            }
        }
    }

    /// The counters of the loop device.
    fn device(&self) -> PathBuf {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let here = format!(" {} ", self.mounted.display());
        let line = mounts.lines().find(|line| line.contains(&here)).expect("it is mounted");
        let name = line.split(' ').next().and_then(|device| device.strip_prefix("/dev/")).expect("a device");
        PathBuf::from(format!("/sys/block/{name}/stat"))
    }

    /// After a cut: the disk as it was then. False when there was none.
    pub fn power_returns(&self) -> bool {
        if !self.cut().exists() {
            return false;
        }
        command_ok(Command::new("umount").arg(&self.mounted)).unwrap();
        fs::rename(self.cut(), &self.image).unwrap();
        self.mount();
        true
    }
}

/// The layer itself: what was synced is there after a cut, what was not is gone.
#[test]
fn a_cut_loses_what_was_not_synced_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::new(folder.path());
    let write = |name: &str, sync: bool| {
        let path = disk.path().join(name);
        fs::write(&path, name).unwrap();
        if sync {
            File::open(&path).unwrap().sync_all().unwrap();
        }
    };
    write("synced", true);
    write("not", false);
    disk.copying()();
    write("later", true);
    assert!(disk.power_returns());
    let there = |name: &str| fs::read_to_string(disk.path().join(name)).unwrap_or_default();
    assert_eq!(
        (there("synced"), there("not"), there("later")),
        ("synced".into(), String::new(), String::new())
    );
    assert!(!disk.power_returns());
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mounted).status();
    }
}
