//! What CRIU's images are made of: two magic words, then entries, each a length of 4 bytes and a protocol buffer (CRIU's
//! `criu/protobuf.c`).

/// Bytes of the magic words.
pub(super) const MAGIC: usize = 8;

/// The next entry; what is left stands behind it. `None` where it is cut off.
pub(super) fn entry<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, behind) = rest.split_first_chunk::<4>()?;
    let (entry, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    *rest = behind;
    Some(entry)
}

/// The entries of an image.
pub(super) fn entries(image: &[u8]) -> Option<Vec<&[u8]>> {
    let mut rest = image.get(MAGIC..)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        found.push(entry(&mut rest)?);
    }
    Some(found)
}

/// Appends an entry; `None` where it is too long for one.
pub(super) fn put_entry(to: &mut Vec<u8>, entry: &[u8]) -> Option<()> {
    to.extend_from_slice(&u32::try_from(entry.len()).ok()?.to_le_bytes());
    to.extend_from_slice(entry);
    Some(())
}

/// A field of a protocol buffer.
pub(super) struct Field<'a> {
    pub number: u64,
    /// With its key.
    pub whole: &'a [u8],
    /// Of a field of variable length.
    pub body: Option<&'a [u8]>,
    /// Of a number.
    pub value: Option<u64>,
}

/// The fields of one; `None` where it is none.
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

pub(super) fn put_varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}
