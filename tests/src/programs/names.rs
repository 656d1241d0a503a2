//! Processes that create, link, rename, exchange, move and remove at random in the same three
//! directories: most calls meet what another one is just changing.
//!
//! Each process also has a mark: a file of its own whose *name* holds how many marks it has made and
//! which ones of the others it saw (in a listing) before. It is renamed for each mark. So a cut can be
//! checked by names alone: one mark for each process, and nobody saw a mark that is not there yet.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Place, Program, fork_writers, workload};
use crate::random::{Random, given_seed};
use crate::world::rounds;

/// How many processes.
pub const PROCESSES: usize = 8;
/// Calls that each makes at least, in a long run.
const CALLS_LONG: usize = 25_000;
/// Calls between two marks.
const MARK_EVERY: usize = 8;
/// Calls between two short rests.
const REST_EVERY: usize = 8;

/// See the module.
pub struct RandomNames;

impl Program for RandomNames {
    fn name(&self) -> &'static str {
        "random-names"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        self.progress(&place.data).is_ok_and(|marks| marks > 200)
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        // A listing can miss what is renamed meanwhile.
        for _ in 0..1000 {
            let marks = marks(tree)?;
            if marks.is_empty() || marks.len() == PROCESSES {
                return Ok(marks.iter().map(|m| m.number).sum());
            }
        }
        anyhow::bail!("never {PROCESSES} marks at once in {}", tree.display())
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let marks = marks(tree)?;
        if marks.is_empty() {
            return Ok(Vec::new());
        }
        let mut wrong = Vec::new();
        let mut made = [None; PROCESSES];
        for mark in &marks {
            if made[mark.process].replace(mark.number).is_some() {
                wrong.push(format!("process {} has two marks: {marks:?}", mark.process));
            }
        }
        for mark in &marks {
            for (other, seen) in mark.seen.iter().enumerate() {
                if *seen > made[other].unwrap_or(0) {
                    wrong.push(format!("{mark:?} saw what is not there: {made:?}"));
                }
            }
        }
        Ok(wrong)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark {
    process: usize,
    number: u64,
    seen: [u64; PROCESSES],
}

impl Mark {
    fn name(&self) -> String {
        let seen: Vec<String> = self.seen.iter().map(u64::to_string).collect();
        format!("{}.{}.{}", self.process, self.number, seen.join("-"))
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let process = parts.next()?.parse().ok().filter(|p| *p < PROCESSES)?;
        let number = parts.next()?.parse().ok()?;
        let seen: Vec<u64> = parts.next()?.split('-').map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { process, number, seen: seen.try_into().ok()? })
    }
}

/// The marks of a tree; none before the processes began.
fn marks(tree: &Path) -> Result<Vec<Mark>> {
    let entries = match std::fs::read_dir(tree.join("marks")) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut marks = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let mark = name.to_str().and_then(Mark::parse);
        marks.push(mark.with_context(|| format!("{name:?} is no mark"))?);
    }
    Ok(marks)
}

/// The parent (no `writer`) or one process.
///
/// # Errors
/// What is not to be expected when others are at work in the same directories.
pub fn run(place: &Place, writer: Option<usize>) -> Result<()> {
    let Some(me) = writer else {
        for directory in ["d0", "d1", "d2", "marks"] {
            std::fs::create_dir(place.data.join(directory))?;
        }
        std::fs::create_dir(place.aux.join("outside"))?;
        for process in 0..PROCESSES {
            let mark = Mark { process, number: 0, seen: [0; PROCESSES] };
            std::fs::write(place.data.join("marks").join(mark.name()), "")?;
        }
        return fork_writers("random-names", place, PROCESSES);
    };
    // Relative paths must not touch what belongs to whoever started us.
    std::env::set_current_dir(place.data.join("d0"))?;
    let seed = given_seed().unwrap_or(1);
    let mut worker = Worker::new(place, me, Random::new(seed.wrapping_mul(1000) + me as u64))?;
    let least = rounds(0, CALLS_LONG);
    let mut calls = 0;
    while calls < least || !place.stopping() {
        worker.call();
        calls += 1;
        if calls % MARK_EVERY == 0 {
            worker.mark()?;
        }
        if calls % REST_EVERY == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

/// A directory to begin a path at, and the path.
type At = (i32, CString);

struct Worker {
    random: Random,
    data: CString,
    outside: CString,
    /// One of the directories, held open; it moves, or is removed.
    directory: i32,
    marks: std::path::PathBuf,
    mark: Mark,
}

impl Worker {
    fn new(place: &Place, me: usize, random: Random) -> Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes());
        Ok(Self {
            random,
            data: text(&place.data)?,
            outside: text(&place.aux.join("outside"))?,
            directory: libc::AT_FDCWD,
            marks: place.data.join("marks"),
            mark: Mark { process: me, number: 0, seen: [0; PROCESSES] },
        })
    }

    /// Looks at the marks of the others, and renames the own one.
    fn mark(&mut self) -> Result<()> {
        let before = self.marks.join(self.mark.name());
        for entry in std::fs::read_dir(&self.marks)? {
            let name = entry?.file_name();
            let mark = name.to_str().and_then(Mark::parse).with_context(|| format!("{name:?}"))?;
            let seen = &mut self.mark.seen[mark.process];
            *seen = mark.number.max(*seen);
        }
        self.mark.number += 1;
        std::fs::rename(&before, self.marks.join(self.mark.name())).context("the own mark is gone")
    }

    fn directory_name(&mut self) -> String {
        let top = format!("d{}", self.random.below(3));
        match self.random.below(10) {
            0..6 => top,
            6..9 => format!("{top}/s{}", self.random.below(2)),
            _ => format!("{top}/s{}/s{}", self.random.below(2), self.random.below(2)),
        }
    }

    fn below(&mut self, name: String) -> At {
        let directory = self.directory_name();
        match self.random.below(20) {
            0 => (self.directory, CString::new(name).expect("no zero")),
            1 => (self.directory, CString::new(format!("../{name}")).expect("no zero")),
            2 => (libc::AT_FDCWD, CString::new(name).expect("no zero")),
            3 => (libc::AT_FDCWD, CString::new(format!("../{directory}/{name}")).expect("no zero")),
            4 => self.absolute(&self.outside.clone(), &name),
            _ => self.absolute(&self.data.clone(), &format!("{directory}/{name}")),
        }
    }

    fn absolute(&self, root: &CString, below: &str) -> At {
        let path = Path::new(OsStr::from_bytes(root.as_bytes())).join(below);
        (libc::AT_FDCWD, CString::new(path.as_os_str().as_bytes()).expect("no zero"))
    }

    fn file(&mut self) -> At {
        let name = format!("f{}", self.random.below(8));
        self.below(name)
    }

    fn subdirectory(&mut self) -> At {
        let name = format!("s{}", self.random.below(2));
        self.below(name)
    }

    fn open(&mut self, at: &At, flags: i32) -> i32 {
        // SAFETY: the path ends with a zero byte.
        unsafe { libc::openat(at.0, at.1.as_ptr(), flags | libc::O_CLOEXEC | libc::O_NONBLOCK, 0o644) }
    }

    fn write_some(&mut self, fd: i32) {
        let bytes = vec![self.random.next() as u8; 1 + self.random.below(3000)];
        // SAFETY: the buffer has that many bytes. The outcome does not matter.
        unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    }

    /// One random call, or a few that belong together. Most of what can fail does at times: what was
    /// there a moment ago is gone.
    #[allow(clippy::too_many_lines, reason = "one arm for each kind of call")]
    fn call(&mut self) {
        let kind = self.random.below(100);
        // SAFETY: paths end with a zero byte and live until the call ends; descriptors are those that
        // were opened here, each closed once.
        unsafe {
            match kind {
                0..20 => {
                    let at = self.file();
                    let more = *self.random.of(&[0, libc::O_EXCL, libc::O_TRUNC, libc::O_APPEND]);
                    let fd = self.open(&at, libc::O_CREAT | libc::O_WRONLY | more);
                    if fd >= 0 {
                        self.write_some(fd);
                        if self.random.chance(20) {
                            self.write_some(fd);
                        }
                        if self.random.chance(10) {
                            libc::ftruncate(fd, self.random.below(5000) as i64);
                        }
                        libc::close(fd);
                    }
                }
                20..28 => {
                    let at = self.file();
                    let fd = self.open(&at, libc::O_RDWR);
                    if fd >= 0 {
                        if self.random.chance(30) {
                            libc::unlinkat(at.0, at.1.as_ptr(), 0);
                        }
                        self.write_some(fd);
                        libc::close(fd);
                    }
                }
                28..42 => {
                    let at = self.file();
                    libc::unlinkat(at.0, at.1.as_ptr(), 0);
                }
                42..60 => {
                    let (from, to) = (self.file(), self.file());
                    let flags = *self.random.of(&[
                        0,
                        0,
                        0,
                        0,
                        libc::RENAME_NOREPLACE,
                        libc::RENAME_EXCHANGE,
                        libc::RENAME_EXCHANGE,
                    ]);
                    libc::renameat2(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), flags);
                }
                60..70 => {
                    let (from, to) = (self.file(), self.file());
                    libc::linkat(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), 0);
                }
                70..76 => {
                    let at = self.subdirectory();
                    libc::mkdirat(at.0, at.1.as_ptr(), 0o755);
                }
                76..79 => {
                    let at = self.subdirectory();
                    libc::unlinkat(at.0, at.1.as_ptr(), libc::AT_REMOVEDIR);
                }
                79..86 => {
                    let (from, to) = (self.subdirectory(), self.subdirectory());
                    let flags = *self.random.of(&[0, 0, libc::RENAME_EXCHANGE]);
                    libc::renameat2(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), flags);
                }
                86..88 => {
                    // A file and a directory change places, or a file comes where one was.
                    let (from, to) = (self.file(), self.subdirectory());
                    libc::renameat2(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), libc::RENAME_EXCHANGE);
                }
                88..90 => {
                    let (to, at) = (self.file(), self.file());
                    libc::symlinkat(to.1.as_ptr(), at.0, at.1.as_ptr());
                }
                90..92 => {
                    let at = self.file();
                    let mode = *self.random.of(&[0o600, 0o644, 0o755]);
                    libc::fchmodat(at.0, at.1.as_ptr(), mode, 0);
                }
                92..94 => {
                    let at = self.file();
                    if at.0 == libc::AT_FDCWD {
                        libc::truncate(at.1.as_ptr(), self.random.below(5000) as i64);
                    }
                }
                94..96 => {
                    let at = self.file();
                    if at.0 == libc::AT_FDCWD {
                        let value = [self.random.next() as u8; 8];
                        libc::setxattr(at.1.as_ptr(), c"user.mark".as_ptr(), value.as_ptr().cast(), 8, 0);
                    }
                }
                96..98 => {
                    let (directory, at) = (self.directory_name(), self.file());
                    let directory = self.absolute(&self.data, &directory);
                    let fd = self.open(&directory, libc::O_TMPFILE | libc::O_RDWR);
                    if fd >= 0 {
                        self.write_some(fd);
                        let own = CString::new(format!("/proc/self/fd/{fd}")).expect("no zero");
                        let follow = libc::AT_SYMLINK_FOLLOW;
                        libc::linkat(libc::AT_FDCWD, own.as_ptr(), at.0, at.1.as_ptr(), follow);
                        libc::close(fd);
                    }
                }
                98 => {
                    let directory = self.directory_name();
                    let directory = self.absolute(&self.data, &directory);
                    if self.random.chance(50) {
                        libc::chdir(directory.1.as_ptr());
                    } else {
                        let fd = self.open(&directory, libc::O_PATH | libc::O_DIRECTORY);
                        if fd >= 0 {
                            if self.directory >= 0 {
                                libc::close(self.directory);
                            }
                            self.directory = fd;
                        }
                    }
                }
                _ => {
                    let at = self.file();
                    libc::mknodat(at.0, at.1.as_ptr(), libc::S_IFIFO | 0o600, 0);
                }
            }
        }
    }
}

/// Whether a run was long enough to mean something: the calls that the marks stand for.
///
/// # Errors
/// When it was not, or the marks cannot be read.
pub fn made_at_least(tree: &Path, calls: u64) -> Result<()> {
    let made = RandomNames.progress(tree)? * MARK_EVERY as u64;
    ensure!(made >= calls, "only {made} calls were made, {calls} are wanted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_saw_what_is_not_there_is_found() {
        let tree = tempfile::tempdir().unwrap();
        let place = Place { data: tree.path().into(), aux: tree.path().into() };
        std::fs::create_dir(tree.path().join("marks")).unwrap();
        let put = |process, number, seen| {
            let name = Mark { process, number, seen }.name();
            std::fs::write(tree.path().join("marks").join(&name), "").unwrap();
            tree.path().join("marks").join(name)
        };
        put(0, 5, [5, 3, 0, 0, 0, 0, 0, 0]);
        let other = put(1, 3, [4, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(RandomNames.check(tree.path(), &place).unwrap(), Vec::<String>::new());
        std::fs::remove_file(other).unwrap();
        put(1, 2, [6, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(RandomNames.check(tree.path(), &place).unwrap().len(), 2);
    }
}
