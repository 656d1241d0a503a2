//! Records that travel packed: their bytes as one LZ4 block (raw, without a frame of its own).
//!
//! Only the wire knows of that. Checksums and the chain are over the plain bytes, which is what the log gets. What a peer says
//! about the length is bounded before a byte of memory is taken for it, so no small body becomes a large one.

use bytes::Bytes;

use super::WireError;

/// Longest plain body that is packed: an agent's batches have no more.
pub const PACK_MAX: usize = 4 << 20;
/// What is shorter is not looked at.
const PACK_MIN: usize = 64;
/// A byte of an LZ4 block gives so many at most: a length is counted on in bytes of 255.
const GROWS_MAX: usize = 255;

/// These bytes packed, if they get smaller by that.
#[must_use]
pub fn pack(plain: &[u8]) -> Option<Vec<u8>> {
    if !(PACK_MIN..=PACK_MAX).contains(&plain.len()) {
        return None;
    }
    let packed = lz4_flex::block::compress(plain);
    (packed.len() < plain.len()).then_some(packed)
}

/// The plain bytes, of which there are to be so many.
///
/// # Errors
/// [`WireError::TooLong`] beyond [`PACK_MAX`]; [`WireError::Bad`] if these cannot be the plain bytes.
pub fn unpack(packed: &[u8], plain_len: u32) -> Result<Bytes, WireError> {
    let len = plain_len as usize;
    if len > PACK_MAX {
        return Err(WireError::TooLong(len));
    }
    let bad = |why: String| WireError::Bad(format!("packed records: {why}"));
    if len <= packed.len() || len > packed.len().saturating_mul(GROWS_MAX) {
        return Err(bad(format!("{} bytes are not {len}", packed.len())));
    }
    let mut plain = vec![0; len];
    match lz4_flex::block::decompress_into(packed, &mut plain) {
        Ok(got) if got == len => Ok(plain.into()),
        Ok(got) => Err(bad(format!("{got} bytes come out, not {len}"))),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Of a field that says whether records may come packed: where it is false, it is left out.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
pub(super) fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use super::super::{Frame, decode_frame, encode_frame};
    use super::*;
    use crate::record::{GroupId, Sequence};

    fn hex(text: &str) -> Vec<u8> {
        let text: String = text.split_whitespace().collect();
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn text() -> Vec<u8> {
        (0..2000).flat_map(|n| format!("line {n} of a file that is much like a log\n").into_bytes()).collect()
    }

    #[test]
    fn what_is_packed_is_unpacked_and_what_does_not_get_smaller_is_not() {
        let plain = text();
        let packed = pack(&plain).unwrap();
        assert!(packed.len() < plain.len() / 3, "{} of {}", packed.len(), plain.len());
        assert_eq!(unpack(&packed, plain.len() as u32).unwrap(), plain);
        let mut state = 1u64;
        let noise: Vec<u8> = (0..100_000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        assert_eq!(pack(&noise), None);
        assert_eq!(pack(&[0; PACK_MIN - 1]), None);
        assert_eq!(pack(&vec![0; PACK_MAX + 1]), None);
        let most = pack(&vec![0; PACK_MAX]).unwrap();
        assert_eq!(unpack(&most, PACK_MAX as u32).unwrap().len(), PACK_MAX, "the most that a block grows by");
    }

    /// A literal `a`, the same 95 times more from 1 byte before, and 5 literals at the end, as the LZ4 block format has it.
    #[test]
    fn golden_bytes() {
        let packed = hex("1f 61 0100 4c 50 6161616161");
        assert_eq!(unpack(&packed, 101).unwrap(), vec![b'a'; 101]);
        // An encoder may choose other sequences for the same.
        let ours = pack(&[b'a'; 101]).unwrap();
        assert_eq!(unpack(&ours, 101).unwrap(), vec![b'a'; 101]);
    }

    #[test]
    fn a_bomb_takes_no_memory() {
        // Bytes that would give more than they may, and a length that such bytes cannot have.
        let packed = pack(&vec![0; PACK_MAX]).unwrap();
        assert_eq!(unpack(&packed, PACK_MAX as u32 + 1), Err(WireError::TooLong(PACK_MAX + 1)));
        assert_eq!(unpack(&packed, u32::MAX), Err(WireError::TooLong(u32::MAX as usize)));
        assert!(matches!(unpack(&packed, 1 << 20), Err(WireError::Bad(_))), "more comes out than was said");
        assert!(matches!(unpack(&packed[..1000], PACK_MAX as u32), Err(WireError::Bad(_))));
        assert!(matches!(unpack(&[], 0), Err(WireError::Bad(_))));
        assert!(matches!(unpack(b"ab", 2), Err(WireError::Bad(_))), "what is no longer is sent plain");
    }

    #[test]
    fn what_is_cut_or_flipped_is_refused_or_as_long_as_it_said() {
        let plain = &text()[..3000];
        let packed = pack(plain).unwrap();
        for cut in 0..packed.len() {
            assert!(unpack(&packed[..cut], plain.len() as u32).is_err(), "cut at {cut}");
        }
        for bit in 0..packed.len() * 8 {
            let mut flipped = packed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // Which bytes they are is told by the checksum of each record.
            if let Ok(got) = unpack(&flipped, plain.len() as u32) {
                assert_eq!(got.len(), plain.len());
            }
        }
        for wrong in [0, 1, plain.len() - 1, plain.len() + 1, PACK_MAX] {
            assert!(unpack(&packed, wrong as u32).is_err(), "{wrong}");
        }
    }

    /// Who does not want anything packed says what he said before there was such a thing, and is understood so.
    #[test]
    fn what_is_not_asked_for_is_not_said() {
        let hello = |lz4| Frame::Hello {
            group: "g".into(),
            group_id: GroupId([1; 16]),
            boot_id: [2; 16],
            epoch: None,
            take_over: false,
            maps: Vec::new(),
            lz4,
        };
        let (one, two) = ("01".repeat(16), "02".repeat(16));
        let before = format!("37000000 33000000 81 a548656c6c6f 96 a167 dc0010{one} dc0010{two} c0 c2 90");
        let asks = format!("38000000 34000000 81 a548656c6c6f 97 a167 dc0010{one} dc0010{two} c0 c2 90 c3");
        assert_eq!(encode_frame(&hello(false), b""), hex(&before));
        assert_eq!(encode_frame(&hello(true), b""), hex(&asks));
        let packed = Frame::Packed { first: Sequence(3), count: 2, plain_len: 300 };
        let bytes = "12000000 0e000000 81 a65061636b6564 93 03 02 cd012c";
        assert_eq!(encode_frame(&packed, b""), hex(bytes));
        for lz4 in [false, true] {
            assert_eq!(decode_frame(encode_frame(&hello(lz4), b"")).unwrap().0, hello(lz4));
        }
    }
}
