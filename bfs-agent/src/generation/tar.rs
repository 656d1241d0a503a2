//! Members of a tar archive, as POSIX.1-2001 (pax) and GNU tar write them. Pure.
//!
//! What a header of 1988 has no room for stands in an extended header before it: long paths, times with nanoseconds,
//! large numbers, extended attributes (`SCHILY.xattr.NAME`), and where the bytes of a file with holes stand (GNU sparse
//! format 1.0). A crate would write the header, which is the smaller part, and none of the rest.

use bfs_common::record::{FileKind, Meta};

/// Bytes of a block.
pub const BLOCK: usize = 512;
/// An archive ends at a multiple of this.
const RECORD: usize = 20 * BLOCK;
/// Longest path in a header.
const NAME_MAX: usize = 100;
/// What fits into the fields for owners and for times and sizes.
const OWNER_MAX: u64 = 0o7_777_777;
const NUMBER_MAX: u64 = 0o77_777_777_777;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// An object; of a regular file the bytes follow.
    Object(FileKind),
    /// Another name of a member that was there: its path.
    HardLink(&'a [u8]),
}

/// A member.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Its path, without a slash at either end.
    pub path: &'a [u8],
    /// What it is.
    pub kind: Kind<'a>,
    /// Its attributes.
    pub meta: &'a Meta,
    /// Extended attributes.
    pub xattrs: &'a [(String, bytes::Bytes)],
    /// Target of a symlink.
    pub target: &'a [u8],
    /// Of a device: major and minor number.
    pub device: (u32, u32),
    /// Size of a regular file.
    pub size: u64,
}

/// Ranges of a file that have bytes, in order: offset and length.
pub type Extents = [(u64, u64)];

/// The headers of a member. With `extents` the file has holes everywhere else; the bytes of these follow, and then
/// [`padding`] up to the whole of [`stored`].
#[must_use]
pub fn header(member: &Member<'_>, extents: Option<&Extents>) -> Vec<u8> {
    let map = extents.map(|extents| sparse_map(extents, member.size));
    let is_file = member.kind == Kind::Object(FileKind::Regular);
    let stored = if is_file { stored(member.size, extents) } else { 0 };
    let mut path = member.path.to_vec();
    if member.kind == Kind::Object(FileKind::Directory) {
        path.push(b'/');
    }
    let mut pax = Vec::new();
    if map.is_some() {
        line(&mut pax, b"GNU.sparse.major", b"1");
        line(&mut pax, b"GNU.sparse.minor", b"0");
        line(&mut pax, b"GNU.sparse.name", &path);
        line(&mut pax, b"GNU.sparse.realsize", member.size.to_string().as_bytes());
        path = sparse_name(&path);
    }
    if path.len() > NAME_MAX || !path.is_ascii() {
        line(&mut pax, b"path", &path);
    }
    let link = match member.kind {
        Kind::HardLink(to) => to,
        Kind::Object(FileKind::Symlink) => member.target,
        Kind::Object(_) => b"",
    };
    if link.len() > NAME_MAX || !link.is_ascii() {
        line(&mut pax, b"linkpath", link);
    }
    let (uid, gid) = (u64::from(member.meta.uid), u64::from(member.meta.gid));
    for (what, number) in [("uid", uid), ("gid", gid)] {
        if number > OWNER_MAX {
            line(&mut pax, what.as_bytes(), number.to_string().as_bytes());
        }
    }
    if stored > NUMBER_MAX {
        line(&mut pax, b"size", stored.to_string().as_bytes());
    }
    let seconds = u64::try_from(member.meta.mtime_sec).ok().filter(|seconds| *seconds <= NUMBER_MAX);
    if member.meta.mtime_nsec > 0 || seconds.is_none() {
        line(&mut pax, b"mtime", time(member.meta).as_bytes());
    }
    if !matches!(member.kind, Kind::HardLink(_)) {
        for (name, value) in member.xattrs {
            line(&mut pax, &xattr_keyword(name), value);
        }
    }
    let mut out = Vec::new();
    if !pax.is_empty() {
        let field = Fields {
            path: &sparse_name_of("PaxHeaders", &path),
            mode: 0o644,
            owner: (0, 0),
            size: pax.len() as u64,
            mtime: 0,
            kind: b'x',
            link: b"",
            device: (0, 0),
        };
        out.extend_from_slice(&block(&field));
        let padding = padding(pax.len() as u64);
        out.extend_from_slice(&pax);
        out.resize(out.len() + padding, 0);
    }
    out.extend_from_slice(&block(&Fields {
        path: &path,
        mode: u64::from(member.meta.permissions & 0o7777),
        owner: (uid.min(OWNER_MAX), gid.min(OWNER_MAX)),
        size: stored.min(NUMBER_MAX),
        mtime: seconds.unwrap_or(0),
        kind: match member.kind {
            Kind::HardLink(_) => b'1',
            Kind::Object(FileKind::Regular | FileKind::Socket) => b'0',
            Kind::Object(FileKind::Symlink) => b'2',
            Kind::Object(FileKind::CharDevice) => b'3',
            Kind::Object(FileKind::BlockDevice) => b'4',
            Kind::Object(FileKind::Directory) => b'5',
            Kind::Object(FileKind::Fifo) => b'6',
        },
        link,
        device: member.device,
    }));
    out.extend(map.unwrap_or_default());
    out
}

/// Bytes of a file in the archive, behind its header.
#[must_use]
pub fn stored(size: u64, extents: Option<&Extents>) -> u64 {
    match extents {
        Some(all) => sparse_map(all, size).len() as u64 + all.iter().map(|(_, len)| len).sum::<u64>(),
        None => size,
    }
}

/// Zeros behind so many bytes, up to the end of their last block.
#[must_use]
pub const fn padding(bytes: u64) -> usize {
    ((BLOCK as u64 - bytes % BLOCK as u64) % BLOCK as u64) as usize
}

/// What an archive of so many bytes ends with.
#[must_use]
pub fn trailer(bytes: u64) -> Vec<u8> {
    let end = bytes + 2 * BLOCK as u64;
    vec![0; (end.next_multiple_of(RECORD as u64) - bytes) as usize]
}

/// Where the bytes stand: as GNU tar writes it, with an empty one at the end of a file that ends with a hole.
fn sparse_map(extents: &Extents, size: u64) -> Vec<u8> {
    let last = extents.last().is_none_or(|(offset, len)| offset + len < size).then_some((size, 0));
    let all: Vec<_> = extents.iter().copied().chain(last).collect();
    let mut out = format!("{}\n", all.len()).into_bytes();
    for (offset, len) in all {
        out.extend_from_slice(format!("{offset}\n{len}\n").as_bytes());
    }
    out.resize(out.len() + padding(out.len() as u64), 0);
    out
}

/// The name of a file with holes for a tar that does not know them.
fn sparse_name(path: &[u8]) -> Vec<u8> {
    sparse_name_of("GNUSparseFile.0", path)
}

/// A name in a folder of its own beside the path.
fn sparse_name_of(folder: &str, path: &[u8]) -> Vec<u8> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    [&path[..at], folder.as_bytes(), b"/", &path[at..]].concat()
}

/// An `=` would end the keyword.
fn xattr_keyword(name: &str) -> Vec<u8> {
    format!("SCHILY.xattr.{}", name.replace('%', "%25").replace('=', "%3D")).into_bytes()
}

/// Seconds since 1970; before that both parts are negative.
fn time(meta: &Meta) -> String {
    let (seconds, nanoseconds) = (meta.mtime_sec, u64::from(meta.mtime_nsec));
    if seconds < 0 {
        let all = -(i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds));
        return format!("-{}.{:09}", all / 1_000_000_000, all % 1_000_000_000);
    }
    format!("{seconds}.{nanoseconds:09}")
}

/// A line of an extended header: its length, counted with itself, and what it says.
fn line(out: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    let rest = keyword.len() + value.len() + 3;
    let mut len = rest + rest.to_string().len();
    len = rest + len.to_string().len();
    out.extend_from_slice(len.to_string().as_bytes());
    for part in [&b" "[..], keyword, b"=", value, b"\n"] {
        out.extend_from_slice(part);
    }
}

struct Fields<'a> {
    path: &'a [u8],
    mode: u64,
    owner: (u64, u64),
    size: u64,
    mtime: u64,
    kind: u8,
    link: &'a [u8],
    device: (u32, u32),
}

fn block(fields: &Fields<'_>) -> [u8; BLOCK] {
    let mut out = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let octal = |number: u64, digits: usize| format!("{number:0digits$o}\0").into_bytes();
    put(0, &fields.path[..fields.path.len().min(NAME_MAX)]);
    put(100, &octal(fields.mode, 7));
    put(108, &octal(fields.owner.0, 7));
    put(116, &octal(fields.owner.1, 7));
    put(124, &octal(fields.size, 11));
    put(136, &octal(fields.mtime, 11));
    put(148, b"        ");
    put(156, &[fields.kind]);
    put(157, &fields.link[..fields.link.len().min(NAME_MAX)]);
    put(257, b"ustar\x0000");
    put(329, &octal(u64::from(fields.device.0), 7));
    put(337, &octal(u64::from(fields.device.1), 7));
    let sum: u64 = out.iter().map(|byte| u64::from(*byte)).sum();
    let sum = format!("{sum:06o}\0 ");
    out[148..156].copy_from_slice(sum.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(mtime_sec: i64, mtime_nsec: u32) -> Meta {
        Meta { permissions: 0o640, uid: 1000, gid: 100, mtime_sec, mtime_nsec }
    }

    fn member<'a>(path: &'a [u8], meta: &'a Meta, size: u64) -> Member<'a> {
        let kind = Kind::Object(FileKind::Regular);
        Member { path, kind, meta, xattrs: &[], target: b"", device: (0, 0), size }
    }

    #[test]
    fn a_plain_file_needs_one_block() {
        let meta = meta(1_000_000_000, 0);
        let out = header(&member(b"srv/data/a", &meta, 5), None);
        assert_eq!(out.len(), BLOCK);
        assert_eq!(out[..10], *b"srv/data/a");
        assert_eq!(
            out[100..156],
            *b"0000640\x000001750\x000000144\x0000000000005\x0007346545000\x00011152\0 "
        );
        assert_eq!(out[156], b'0');
        assert_eq!((padding(5), padding(512), padding(0)), (507, 0, 0));
        assert_eq!(trailer(1536).len(), RECORD - 1536);
        assert_eq!(trailer(RECORD as u64 - 512).len(), RECORD + 512);
    }

    #[test]
    fn lines_count_themselves() {
        for len in 0..1200 {
            let mut out = Vec::new();
            line(&mut out, b"k", &vec![b'x'; len]);
            let said: usize =
                String::from_utf8(out.clone()).unwrap().split(' ').next().unwrap().parse().unwrap();
            assert_eq!(said, out.len());
        }
    }

    #[test]
    fn what_has_no_room_stands_before() {
        let meta = Meta { uid: u32::MAX - 1, ..meta(-2, 700_000_000) };
        let long = [b'd'; 150];
        let xattrs = [("user.a=b%".to_owned(), bytes::Bytes::from_static(b"\0\xff"))];
        let out = header(&Member { xattrs: &xattrs, ..member(&long, &meta, 0) }, None);
        let pax = &out[BLOCK..2 * BLOCK];
        let has = |text: &[u8]| pax.windows(text.len()).any(|window| window == text);
        assert!(has(&[b" path=", &long[..], b"\n"].concat()));
        assert!(has(b" uid=4294967294\n") && has(b" mtime=-1.300000000\n"));
        assert!(has(b" SCHILY.xattr.user.a%3Db%25=\0\xff\n"));
        assert_eq!(out.len(), 3 * BLOCK);
    }

    #[test]
    fn a_file_with_holes_says_where_its_bytes_are() {
        let meta = meta(0, 0);
        let extents = [(4096, 10), (8192, 4)];
        let out = header(&member(b"d/f", &meta, 1 << 20), Some(&extents));
        assert_eq!(out.len(), 4 * BLOCK);
        assert_eq!(out[2 * BLOCK..2 * BLOCK + 21], *b"d/GNUSparseFile.0/f\0\0");
        assert_eq!(out[3 * BLOCK..3 * BLOCK + 32], *b"3\n4096\n10\n8192\n4\n1048576\n0\n\0\0\0\0\0");
        assert_eq!(stored(1 << 20, Some(&extents)), 512 + 14);
        assert_eq!(sparse_map(&[(0, 7)], 7)[..8], *b"1\n0\n7\n\0\0");
    }
}
