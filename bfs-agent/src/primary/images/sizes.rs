//! The open files in a set of CRIU's images (`files.img`). CRIU refuses to restore a process one of whose files has not
//! the size of the dump. That is right for what is brought back, and wrong for what is not: a log that the command
//! was started with goes on growing. So the sizes of files that come from outside are taken out. Their positions are, too: whoever restores gives
//! a file of his own, maybe a pipe, and where it stands is where it is to go on.
//!
//! `files.img` has two magic words, then entries: a length of 4 bytes, and a protocol buffer `file_entry` (CRIU's
//! `images/fdinfo.proto` and `images/regfile.proto`; numbers of fields never change in such a format).

use std::fs;
use std::io;
use std::path::Path;

/// `file_entry.reg`
const REG: u64 = 3;
/// `reg_file_entry.pos`, and what it is where none is to be restored (`do_open_reg` in CRIU's `files-reg.c`).
const POS: u64 = 3;
const POS_NONE: u64 = u64::MAX;
/// `reg_file_entry.size`
const SIZE: u64 = 8;
/// `reg_file_entry.ext`: it comes from outside.
const EXT: u64 = 9;

/// Bytes of the magic words.
const MAGIC: usize = 8;

/// Takes the sizes and positions of files from outside out of an image.
///
/// # Errors
/// What the file system said, or that the image is not understood.
pub fn forget_sizes(image: &Path) -> io::Result<()> {
    let old = fs::read(image)?;
    let new = without_sizes(&old).ok_or_else(|| io::Error::other("files.img is not understood"))?;
    if new == old { Ok(()) } else { fs::write(image, new) }
}

/// The entries of an image.
pub(super) fn entries(image: &[u8]) -> Option<Vec<&[u8]>> {
    let mut rest = image.get(MAGIC..)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let (entry, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        found.push(entry);
        rest = behind;
    }
    Some(found)
}

fn without_sizes(image: &[u8]) -> Option<Vec<u8>> {
    let mut new = image.get(..MAGIC)?.to_vec();
    for entry in entries(image)? {
        let mut kept = Vec::with_capacity(entry.len());
        for field in fields(entry)? {
            match field {
                Field { number: REG, body: Some(body), .. } => {
                    let inner = fields(body)?;
                    let outside = inner.iter().any(|f| f.number == EXT && f.value != Some(0));
                    let mut reg = Vec::with_capacity(body.len());
                    for field in &inner {
                        match field.number {
                            SIZE if outside => {}
                            POS if outside => {
                                put_varint(&mut reg, POS << 3);
                                put_varint(&mut reg, POS_NONE);
                            }
                            _ => reg.extend_from_slice(field.whole),
                        }
                    }
                    put_varint(&mut kept, REG << 3 | 2);
                    put_varint(&mut kept, reg.len() as u64);
                    kept.extend_from_slice(&reg);
                }
                other => kept.extend_from_slice(other.whole),
            }
        }
        new.extend_from_slice(&u32::try_from(kept.len()).ok()?.to_le_bytes());
        new.extend_from_slice(&kept);
    }
    Some(new)
}

/// A field of a protocol buffer.
pub(super) struct Field<'a> {
    pub number: u64,
    whole: &'a [u8],
    /// Of a field of variable length.
    pub body: Option<&'a [u8]>,
    /// Of a number.
    pub value: Option<u64>,
}

/// The fields of an entry.
pub(super) fn fields(mut bytes: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let begin = bytes;
        let key = varint(&mut bytes)?;
        let (mut body, mut value) = (None, None);
        match key & 7 {
            0 => value = Some(varint(&mut bytes)?),
            1 => bytes = bytes.get(8..)?,
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (head, tail) = bytes.split_at_checked(length)?;
                (body, bytes) = (Some(head), tail);
            }
            5 => bytes = bytes.get(4..)?,
            _ => return None,
        }
        let whole = &begin[..begin.len() - bytes.len()];
        found.push(Field { number: key >> 3, whole, body, value });
    }
    Some(found)
}

/// The number that these bytes begin with, which is taken off.
pub(super) fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn put_varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with one file: id 1, its size, and whether it comes from outside.
    fn image(size: &[u8], ext: &[u8]) -> Vec<u8> {
        let reg = [&[0x08, 1, 0x32, 2, b'f', b'd'][..], size, ext, &[0x50, 0xed, 0x83, 2]].concat();
        let entry = [&[0x08, 1, 0x10, 1, 0x1a, reg.len() as u8][..], &reg].concat();
        [b"magicmag", &(entry.len() as u32).to_le_bytes()[..], &entry].concat()
    }

    #[test]
    fn only_what_comes_from_outside_loses_its_size() {
        let size = [0x40, 0xb0, 0x89, 1];
        let own = image(&size, &[]);
        assert_eq!(without_sizes(&own), Some(own.clone()));
        assert_eq!(without_sizes(&image(&size, &[0x48, 1])), Some(image(&[], &[0x48, 1])));
        assert_eq!(without_sizes(&image(&size, &[0x48, 0])), Some(image(&size, &[0x48, 0])));
    }

    #[test]
    fn and_its_position() {
        let none = [&[0x18][..], &[0xff; 9], &[1]].concat();
        let with = |pos: &[u8], ext| image(&[pos, &[0x40, 1]].concat(), ext);
        assert_eq!(without_sizes(&with(&[0x18, 5], &[0x48, 1])), Some(image(&none, &[0x48, 1])));
        assert_eq!(without_sizes(&with(&[0x18, 5], &[])), Some(with(&[0x18, 5], &[])));
    }

    #[test]
    fn what_is_cut_off_is_not_understood() {
        let whole = image(&[0x40, 1], &[0x48, 1]);
        for length in MAGIC + 1..whole.len() {
            assert_eq!(without_sizes(&whole[..length]), None, "{length}");
        }
        assert_eq!(without_sizes(&[]), None);
    }
}
