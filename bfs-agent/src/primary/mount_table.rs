//! The table of mounts of a process, `/proc/PID/mountinfo` (proc_pid_mountinfo(5)). Paths in it may be any bytes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The file system, as the kernel numbers it (`MKDEV`, include/linux/kdev_t.h).
    pub dev: u32,
    /// The directory of the file system that is mounted; `/` where that is all of it.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
}

/// The lines of a table, in its order. What is no line is left out.
pub fn lines(table: &[u8]) -> impl Iterator<Item = Line> {
    table.split(|byte| *byte == b'\n').filter_map(line)
}

/// id, parent, major:minor, root, mount point.
fn line(text: &[u8]) -> Option<Line> {
    let mut fields = text.split(|byte| *byte == b' ').skip(2);
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let dev = major.parse::<u32>().ok()? << 20 | minor.parse::<u32>().ok()?;
    Some(Line { dev, root: unescaped(fields.next()?), point: unescaped(fields.next()?) })
}

/// Space, tab, newline and backslash are written as `\040` and so on.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        let octal = more.get(..3).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = &more[3..];
            }
            _ => {
                out.push(*first);
                rest = more;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_unescaped() {
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        assert_eq!(unescaped(br"/a\040b\134c\x"), path(br"/a b\c\x"));
        let table = b"22 1 8:3 / /a\\040\xff rw - ext4 x rw\n\nno line\n23 1 0:40 /sub /b rw - tmpfs x rw\n";
        let found: Vec<_> = lines(table).collect();
        assert_eq!(found[0], Line { dev: 8 << 20 | 3, root: path(b"/"), point: path(b"/a \xff") });
        assert_eq!(found[1], Line { dev: 40, root: path(b"/sub"), point: path(b"/b") });
        assert_eq!(found.len(), 2);
    }
}
