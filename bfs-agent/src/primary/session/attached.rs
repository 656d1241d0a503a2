//! Process state of a cgroup whose processes run already.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::program::{forget_promoted, images_of};
use super::state::Selection;
use super::work::Work;
use crate::primary::contained::{Contained, Place};
use crate::primary::failure::Failure;
use crate::primary::images::criu::Criu;
use crate::primary::process::Inherited;

/// Begins to keep it, where it is wanted and a cgroup is followed that is somebody else's.
///
/// # Errors
/// [`Failure`].
pub(super) fn begin(work: &mut Work, criu: Option<Criu>, inherited: &Inherited) -> Result<(), Failure> {
    let (Some(process), Some(criu)) = (work.options.process.clone(), criu) else { return Ok(()) };
    let Selection::Attached(cgroup) = work.kept.selection.clone() else { return Ok(()) };
    let systemd = fs::read_to_string("/proc/1/comm").is_ok_and(|name| name.trim() == "systemd");
    if let Some(unit) = unit_of(&cgroup).filter(|_| systemd) {
        eprintln!(
            "bfs-agent: {unit} is a unit of systemd, which sees its processes end when they go back to a checkpoint here: \
             it may remove the cgroup, or start them anew, which is found out then and refused. `bfs-replayer promote \
             --with-process` on the backup host is not concerned. A cgroup of their own is left alone by systemd"
        );
    }
    let group = work.options.group.clone();
    forget_promoted(&process, &group)?;
    let contained = Arc::new(Mutex::new(Contained::start(inherited, Place::Beside(&cgroup))?));
    let images = images_of((&process, criu, &group, &work.options.roots), &cgroup, &contained, None)?;
    work.images = Some(images);
    work.bring_images();
    Ok(())
}

/// The unit of a service manager that a cgroup belongs to, if its place says that there is one.
fn unit_of(cgroup: &Path) -> Option<&str> {
    let mut names = cgroup.iter().filter_map(|name| name.to_str());
    let is_unit = |name: &&str| name.ends_with(".service") || name.ends_with(".scope");
    names.find(|name| name.ends_with(".slice"))?;
    names.find(is_unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_known_by_its_place() {
        let of = |path| unit_of(Path::new(path));
        assert_eq!(of("/sys/fs/cgroup/system.slice/postgresql.service"), Some("postgresql.service"));
        assert_eq!(of("/sys/fs/cgroup/user.slice/user-0.slice/session-1.scope"), Some("session-1.scope"));
        assert_eq!(of("/sys/fs/cgroup/system.slice/a.service/own"), Some("a.service"));
        assert_eq!(of("/sys/fs/cgroup/own/program"), None);
        assert_eq!(of("/sys/fs/cgroup/my.service"), None);
    }
}
