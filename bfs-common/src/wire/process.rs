//! Images of processes: what both sides have to agree on.

/// Bytes of a block that has a digest of its own: a page of memory.
pub const PROCESS_BLOCK: usize = 4096;
/// Bytes of its digest: a whole blake3, for a block is not sent when the other side has one of the same digest.
pub const PROCESS_DIGEST: usize = 32;
/// Blocks whose digests are in one frame, at most.
pub const PROCESS_BLOCKS_MAX: usize = 16_384;
/// Bytes of blocks in one frame, at most.
pub const PROCESS_PIECE: usize = 1 << 20;
/// Files of one set of images.
pub const PROCESS_FILES_MAX: usize = 65_536;
/// Bytes of the name of one.
pub const PROCESS_FILE_MAX: usize = 100;

/// Whether a file of a set of images may have this name: it becomes one in a folder.
#[must_use]
pub fn process_file_is_valid(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=PROCESS_FILE_MAX).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["pages-1.img", "outside.json", "a"] {
            assert!(process_file_is_valid(name), "{name}");
        }
        let long = "x".repeat(PROCESS_FILE_MAX + 1);
        for name in ["", ".", "..", ".hidden", "a/b", "a\0b", "\u{e4}", &long] {
            assert!(!process_file_is_valid(name), "{name}");
        }
    }
}
