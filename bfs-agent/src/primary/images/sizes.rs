//! The open files in a set of CRIU's images (`files.img`). CRIU refuses to restore a process one of whose files has not
//! the size of the dump. That is right for what is brought back, and wrong for what is not: a log that the command
//! was started with goes on growing. So the sizes of files that come from outside are taken out. Their positions are, too: whoever restores gives
//! a file of his own, maybe a pipe or a terminal, and where it stands is where it is to go on. So their modes are taken out,
//! which CRIU compares as well (`validate_file` in its `files-reg.c`).
//!
//! The entries of `files.img` are protocol buffers `file_entry` (CRIU's `images/fdinfo.proto` and
//! `images/regfile.proto`; numbers of fields never change in such a format).

use std::fs;
use std::io;
use std::path::Path;

use super::protobuf::{Field, MAGIC, entries, fields, put_entry, put_varint};

/// `file_entry.reg`
const REG: u64 = 3;
/// `reg_file_entry.pos`, and what it is where none is to be restored (`do_open_reg` in CRIU's `files-reg.c`).
const POS: u64 = 3;
const POS_NONE: u64 = u64::MAX;
/// `reg_file_entry.size`
const SIZE: u64 = 8;
/// `reg_file_entry.mode`
const MODE: u64 = 10;
/// `reg_file_entry.ext`: it comes from outside.
const EXT: u64 = 9;

/// Takes the sizes, modes and positions of files from outside out of an image.
///
/// # Errors
/// What the file system said, or that the image is not understood.
pub fn forget_sizes(image: &Path) -> io::Result<()> {
    let old = fs::read(image)?;
    let new = without_sizes(&old).ok_or_else(|| io::Error::other("files.img is not understood"))?;
    if new == old { Ok(()) } else { fs::write(image, new) }
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
                            SIZE | MODE if outside => {}
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
        put_entry(&mut new, &kept)?;
    }
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with one file: id 1, its size, and whether it comes from outside.
    fn image(size: &[u8], ext: &[u8]) -> Vec<u8> {
        with_mode(size, ext, &[0x50, 0xed, 0x83, 2])
    }

    fn with_mode(size: &[u8], ext: &[u8], mode: &[u8]) -> Vec<u8> {
        let reg = [&[0x08, 1, 0x32, 2, b'f', b'd'][..], size, ext, mode].concat();
        let entry = [&[0x08, 1, 0x10, 1, 0x1a, reg.len() as u8][..], &reg].concat();
        [b"magicmag", &(entry.len() as u32).to_le_bytes()[..], &entry].concat()
    }

    #[test]
    fn only_what_comes_from_outside_loses_its_size_and_mode() {
        let size = [0x40, 0xb0, 0x89, 1];
        let own = image(&size, &[]);
        assert_eq!(without_sizes(&own), Some(own.clone()));
        assert_eq!(without_sizes(&image(&size, &[0x48, 1])), Some(with_mode(&[], &[0x48, 1], &[])));
        assert_eq!(without_sizes(&image(&size, &[0x48, 0])), Some(image(&size, &[0x48, 0])));
    }

    #[test]
    fn and_its_position() {
        let none = [&[0x18][..], &[0xff; 9], &[1]].concat();
        let with = |pos: &[u8], ext| image(&[pos, &[0x40, 1]].concat(), ext);
        assert_eq!(without_sizes(&with(&[0x18, 5], &[0x48, 1])), Some(with_mode(&none, &[0x48, 1], &[])));
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
