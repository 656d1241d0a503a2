//! Rows: the ways in which a path leads to a file, and directories that come and go.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chroot, symlink};
use std::path::Path;

use super::sys::{self, CWD, at as adr, c, call, fd};
use super::{At, Row, pattern};

pub(super) static ROWS: &[&Row] = &[
    &Row::new("paths/relative", relative),
    &Row::new("paths/from-outside", from_outside),
    &Row::new("paths/switched-outside", switched_outside).everything(),
    &Row::new("paths/chroot", in_chroot),
    &Row::new("paths/bind-mount", bind_mount),
    &Row::new("paths/mounted-for-a-moment", mounted_for_a_moment).everything(),
    &Row::new("paths/above-a-bind-mount", above_a_bind_mount).everything(),
    &Row::new("paths/through-an-own-descriptor", through_own_descriptor),
    &Row::new("paths/through-proc", through_proc).everything(),
    &Row::new("paths/named-outside", named_outside),
    &Row::new("paths/mount-namespace", mount_namespace),
    &Row::new("paths/pivoted-root", pivoted_root),
    &Row::new("paths/mounted-over", mounted_over),
    &Row::new("paths/odd-names", odd_names),
    &Row::new("paths/long-paths", long_paths),
    &Row::new("paths/directory-moves-in", moves_in),
    &Row::new("paths/directory-moves-out", moves_out),
    &Row::new("paths/many-files-in-and-out", many_files),
    &Row::new("paths/open-files-move-out", open_files_move_out),
    &Row::new("paths/unlinked-writes", unlinked_writes).records_max(20),
];

fn relative(at: &At) -> io::Result<()> {
    fs::create_dir_all(at.path("a/b"))?;
    symlink("a", at.path("to-a"))?;
    symlink(at.path("a/b"), at.path("to-b"))?;
    at.pause()?;
    std::env::set_current_dir(&at.dir)?;
    fs::create_dir("here")?;
    fs::create_dir("a/../a/./b/dots")?;
    fs::create_dir("to-a/through-a-link")?;
    fs::create_dir("to-b/through-an-absolute-link")?;
    fs::create_dir("to-b/../above-the-link")?;
    std::env::set_current_dir("a/b")?;
    fs::create_dir("../../from-below")?;
    let directory = sys::open(at.path("a"), libc::O_DIRECTORY, 0)?;
    call(libc::SYS_mkdirat, [fd(&directory), adr(&c("b/by-descriptor")?), 0o755])?;
    call(libc::SYS_mkdirat, [CWD, adr(&c("../by-cwd")?), 0o755])?;
    // Up to the root, down again, and around.
    let up = "../".repeat(40)
        + at.path("around").strip_prefix("/").map_err(io::Error::other)?.to_str().unwrap_or("");
    fs::create_dir(up)?;
    fs::create_dir(format!("//{}//./slashes/", at.dir.display()))
}

/// Symlinks outside that lead in, and descriptors of directories outside.
fn from_outside(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("d"))?;
    symlink(&at.dir, at.outside.join("in"))?;
    symlink("in/d", at.outside.join("deeper"))?;
    at.pause()?;
    fs::create_dir(at.outside.join("in/one"))?;
    fs::create_dir(at.outside.join("deeper/two"))?;
    std::env::set_current_dir(&at.outside)?;
    fs::create_dir("deeper/three")?;
    let directory = sys::open(&at.outside, libc::O_DIRECTORY, 0)?;
    call(libc::SYS_mkdirat, [fd(&directory), adr(&c("deeper/four")?), 0o755])?;
    call(libc::SYS_truncate, [adr(&c("in/none")?), 0])
        .map_or(Ok(()), |_| Err(io::Error::other("it was there")))
}

/// A symlink outside leads elsewhere right after the calls by it.
fn switched_outside(at: &At) -> io::Result<()> {
    for directory in ["d", "e"] {
        fs::create_dir(at.path(directory))?;
        for name in ["gone", "old", "mode", "cut", "named"] {
            fs::write(at.path(directory).join(name), directory)?;
        }
    }
    let now = at.outside.join("now");
    symlink(at.path("d"), &now)?;
    at.pause()?;
    fs::remove_file(now.join("gone"))?;
    fs::create_dir(now.join("made"))?;
    fs::rename(now.join("old"), now.join("new"))?;
    fs::set_permissions(now.join("mode"), fs::Permissions::from_mode(0o640))?;
    fs::hard_link(now.join("named"), now.join("again"))?;
    call(libc::SYS_truncate, [adr(&c(now.join("cut"))?), 0])?;
    symlink(at.path("e"), at.outside.join("next"))?;
    fs::rename(at.outside.join("next"), now)
}

fn in_chroot(at: &At) -> io::Result<()> {
    fs::create_dir_all(at.path("jail/sub"))?;
    symlink("/sub", at.path("jail/absolute"))?;
    let beside = at.beside.join("jail");
    fs::create_dir(&beside)?;
    at.pause()?;
    sys::in_child(|| {
        chroot(at.path("jail"))?;
        fs::create_dir("/first")?;
        std::env::set_current_dir("/")?;
        fs::create_dir("absolute/second")?;
        fs::create_dir("/../../third")?;
        fs::write("/absolute/f", "f")?;
        fs::rename("/absolute/f", "/g")
    })?;
    // The root is outside, the files are inside.
    sys::in_child(|| {
        let inside = sys::open(&at.dir, libc::O_DIRECTORY, 0)?;
        chroot(&beside)?;
        call(libc::SYS_mkdirat, [fd(&inside), adr(&c("by-descriptor")?), 0o755])?;
        call(libc::SYS_fchdir, [fd(&inside)])?;
        fs::create_dir("by-cwd")?;
        fs::create_dir("/nothing-of-ours")?;
        // Still there when the agent asks: on tmpfs a directory is found by its inode only once it was
        // asked for.
        at.pause()
    })
}

fn mount(from: impl AsRef<Path>, to: impl AsRef<Path>, flags: libc::c_ulong) -> io::Result<()> {
    call(libc::SYS_mount, [adr(&c(from)?), adr(&c(to)?), adr(c""), flags as usize, 0]).map(drop)
}

fn umount(at: impl AsRef<Path>) -> io::Result<()> {
    call(libc::SYS_umount2, [adr(&c(at)?), libc::MNT_DETACH as usize]).map(drop)
}

/// What is done below a second path of the row's directory.
fn work_in(directory: &Path, name: &str) -> io::Result<()> {
    let at = |what: &str| directory.join(format!("{name}-{what}"));
    fs::create_dir(at("directory"))?;
    fs::write(at("file"), pattern(2_000, 40))?;
    fs::rename(at("file"), at("directory").join("moved"))?;
    symlink("x", at("link"))?;
    fs::write(at("goes"), "")?;
    fs::remove_file(at("goes"))
}

fn bind_mount(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("sub"))?;
    let there = at.outside.join("bound");
    fs::create_dir(&there)?;
    mount(at.path("sub"), &there, libc::MS_BIND)?;
    at.pause()?;
    work_in(&there, "bound")?;
    std::env::set_current_dir(&there)?;
    work_in(Path::new("."), "cwd")
}

/// The mount is gone again before anybody can look.
fn mounted_for_a_moment(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("sub"))?;
    let there = at.outside.join("bound");
    fs::create_dir(&there)?;
    at.pause()?;
    mount(at.path("sub"), &there, libc::MS_BIND)?;
    let done = work_in(&there, "bound");
    umount(&there)?;
    done
}

/// What is above the root of a bind mount depends on the way.
fn above_a_bind_mount(at: &At) -> io::Result<()> {
    fs::create_dir_all(at.path("sub/deep"))?;
    let there = at.outside.join("bound");
    fs::create_dir(&there)?;
    mount(at.path("sub"), &there, libc::MS_BIND)?;
    at.pause()?;
    std::env::set_current_dir(there.join("deep"))?;
    fs::create_dir("../inside")?;
    fs::create_dir("../../outside")
}

/// Descriptors and working directories by their links in /proc.
/// By the links of descriptors in /proc, as the C library does it.
fn through_own_descriptor(at: &At) -> io::Result<()> {
    let file = at.file("f", 1_000)?;
    fs::create_dir(at.path("d"))?;
    at.pause()?;
    let link = |of: &File| c(format!("/proc/self/fd/{}", fd(of)));
    call(libc::SYS_chmod, [adr(&link(&file)?), 0o4700])?;
    call(libc::SYS_chown, [adr(&link(&file)?), 77, 78])?;
    call(libc::SYS_truncate, [adr(&link(&file)?), 100])?;
    sys::setxattr(format!("/proc/self/fd/{}", fd(&file)), c"trusted.x", b"by its link")?;
    // By a descriptor that reads and writes nothing and is closed again: how lchmod(3) is done.
    let shown = sys::open(at.path("d"), libc::O_PATH, 0)?;
    call(libc::SYS_fchmodat, [CWD, adr(&c(format!("/proc/self/fd/{}", fd(&shown)))?), 0o711])?;
    fs::create_dir(format!("/proc/thread-self/fd/{}/below", fd(&shown)))
}

/// By the other links of processes in /proc: what they led to cannot be told later.
fn through_proc(at: &At) -> io::Result<()> {
    let file = at.file("f", 1_000)?;
    fs::create_dir(at.path("d"))?;
    at.pause()?;
    let pid = std::process::id();
    call(libc::SYS_chmod, [adr(&c(format!("/proc/{pid}/fd/{}", fd(&file)))?), 0o640])?;
    std::env::set_current_dir(&at.dir)?;
    fs::create_dir("/proc/self/cwd/by-cwd")?;
    fs::create_dir(format!("/proc/{pid}/task/{pid}/cwd/by-task"))?;
    fs::create_dir(format!("/proc/self/root/{}/by-root", at.dir.display()))
}

/// A file of the set with another name outside, and changed by that.
fn named_outside(at: &At) -> io::Result<()> {
    at.file("g", 1_000)?;
    fs::hard_link(at.path("g"), at.beside.join("g"))?;
    at.pause()?;
    call(libc::SYS_chmod, [adr(&c(at.beside.join("g"))?), 0o600]).map(drop)
}

fn private_mounts() -> io::Result<()> {
    call(libc::SYS_unshare, [libc::CLONE_NEWNS as usize])?;
    call(libc::SYS_mount, [0, adr(c"/"), 0, (libc::MS_REC | libc::MS_PRIVATE) as usize, 0]).map(drop)
}

fn mount_namespace(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("sub"))?;
    let there = at.outside.join("bound");
    fs::create_dir(&there)?;
    sys::in_child(|| {
        private_mounts()?;
        mount(at.path("sub"), &there, libc::MS_BIND)?;
        at.pause()?;
        work_in(&there, "bound")?;
        work_in(&at.dir, "plain")?;
        std::env::set_current_dir(&there)?;
        work_in(Path::new("."), "cwd")?;
        // Still there when the agent asks.
        at.pause()
    })
}

fn pivoted_root(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("sub"))?;
    sys::in_child(|| {
        private_mounts()?;
        let root = &at.outside;
        call(libc::SYS_mount, [adr(c"tmpfs"), adr(&c(root)?), adr(c"tmpfs"), 0, 0])?;
        fs::create_dir(root.join("inside"))?;
        fs::create_dir(root.join("old"))?;
        mount(&at.dir, root.join("inside"), libc::MS_BIND)?;
        call(libc::SYS_pivot_root, [adr(&c(root)?), adr(&c(root.join("old"))?)])?;
        std::env::set_current_dir("/")?;
        umount("/old")?;
        at.pause()?;
        work_in(Path::new("/inside"), "absolute")?;
        work_in(Path::new("inside/sub"), "relative")?;
        fs::create_dir("/not-ours")?;
        at.pause()
    })
}

/// What is mounted over a directory of the subtree is not part of it; what it hides still is.
fn mounted_over(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("point"))?;
    fs::write(at.path("point/hidden"), "hidden")?;
    sys::in_child(|| {
        let before = sys::open(at.path("point"), libc::O_DIRECTORY, 0)?;
        private_mounts()?;
        call(libc::SYS_mount, [adr(c"tmpfs"), adr(&c(at.path("point"))?), adr(c"tmpfs"), 0, 0])?;
        at.pause()?;
        fs::write(at.path("point/not-ours"), "x")?;
        fs::create_dir(at.path("point/neither"))?;
        fs::create_dir(at.path("beside"))?;
        call(libc::SYS_mkdirat, [fd(&before), adr(&c("below")?), 0o755])?;
        at.pause()
    })
}

fn odd_names(at: &At) -> io::Result<()> {
    let names: [&[u8]; 8] =
        [b"\xff\xfe\x80", b"a\nb", b" ", b"-rf", b"\\", b"...", b"\x01\x7f", "\u{1F600} \u{e9}".as_bytes()];
    at.pause()?;
    for name in names {
        let path = at.dir.join(OsStr::from_bytes(name));
        fs::create_dir(&path)?;
        fs::write(path.join(OsStr::from_bytes(name)), name)?;
        symlink(OsStr::from_bytes(name), path.join("link"))?;
    }
    let longest = [b'n'; 255];
    fs::create_dir(at.dir.join(OsStr::from_bytes(&longest)))?;
    fs::write(at.dir.join(OsStr::from_bytes(&longest)).join(OsStr::from_bytes(&longest)), "long")
}

/// A path as long as the kernel takes it. (The comparison takes no longer ones.)
fn long_paths(at: &At) -> io::Result<()> {
    at.pause()?;
    let mut path = at.dir.clone();
    for level in 0..14 {
        path.push(format!("{level:-<250}"));
        fs::create_dir(&path)?;
    }
    fs::write(path.join("f"), "deep down")?;
    let dots = "./".repeat((libc::PATH_MAX as usize - at.dir.as_os_str().len() - 10) / 2);
    fs::create_dir(format!("{}/{dots}dots", at.dir.display()))?;
    symlink("t".repeat(1_000), at.path("long-target"))
}

fn tree(at: &Path) -> io::Result<()> {
    fs::create_dir_all(at.join("a/b"))?;
    fs::write(at.join("a/f"), pattern(3_000, 41))?;
    fs::write(at.join("a/b/g"), pattern(300, 42))?;
    fs::hard_link(at.join("a/f"), at.join("a/b/f-too"))?;
    symlink("../f", at.join("a/b/link"))
}

fn moves_in(at: &At) -> io::Result<()> {
    tree(&at.beside)?;
    at.pause()?;
    fs::rename(at.beside.join("a"), at.path("came"))?;
    fs::write(at.path("came/b/new"), "after it came")?;
    File::options().append(true).open(at.path("came/f"))?.write_all(b"more")?;
    at.pause()?;
    // From inside to inside, and from outside to outside.
    fs::rename(at.path("came/b"), at.path("b"))?;
    fs::create_dir(at.beside.join("x"))?;
    fs::rename(at.beside.join("x"), at.beside.join("y"))
}

fn moves_out(at: &At) -> io::Result<()> {
    tree(&at.dir)?;
    at.pause()?;
    fs::rename(at.path("a"), at.beside.join("went"))?;
    fs::write(at.beside.join("went/f"), "not ours any more")?;
    at.pause()?;
    // There and back, changed meanwhile.
    fs::rename(at.beside.join("went"), at.path("back"))?;
    fs::rename(at.path("back"), at.beside.join("again"))?;
    fs::write(at.beside.join("again/b/g"), "changed outside")?;
    fs::remove_file(at.beside.join("again/b/link"))?;
    fs::rename(at.beside.join("again"), at.path("home"))
}

fn many_files(at: &At) -> io::Result<()> {
    const FILES: usize = 10_000;
    let there = at.beside.join("many");
    fs::create_dir(&there)?;
    for file in 0..FILES {
        fs::write(there.join(format!("file-{file}")), if file % 100 == 0 { "some bytes" } else { "" })?;
    }
    at.pause()?;
    fs::rename(&there, at.path("many"))?;
    at.pause()?;
    fs::write(at.path("many/file-5000"), "written inside")?;
    fs::rename(at.path("many"), &there)
}

fn open_files_move_out(at: &At) -> io::Result<()> {
    tree(&at.dir)?;
    let mut file = File::options().append(true).open(at.path("a/f"))?;
    std::env::set_current_dir(at.path("a/b"))?;
    at.pause()?;
    fs::rename(at.path("a"), at.beside.join("a"))?;
    file.write_all(b"outside")?;
    fs::write("by-cwd-outside", "x")?;
    at.pause()?;
    fs::rename(at.beside.join("a"), at.path("a"))?;
    file.write_all(b"inside again")?;
    fs::write("by-cwd-inside", "x")?;
    at.pause()?;
    fs::hard_link(at.path("a/f"), at.beside.join("f"))?;
    fs::remove_file(at.path("a/f"))?;
    fs::remove_file(at.path("a/b/f-too"))?;
    file.write_all(b"only outside has a name")
}

/// Temporary files without a name: their bytes cost nothing, neither a record nor room in the stream.
fn unlinked_writes(at: &At) -> io::Result<()> {
    let mut unlinked = at.file("temporary", 10)?;
    fs::remove_file(at.path("temporary"))?;
    let mut nameless = File::from(sys::open(&at.dir, libc::O_TMPFILE | libc::O_RDWR, 0o600)?);
    at.pause()?;
    for _ in 0..2_000 {
        unlinked.write_all(&[7; 500])?;
        nameless.write_all(&[8; 5_000])?;
    }
    unlinked.set_len(5)?;
    fs::write(at.path("last"), "seen")
}
