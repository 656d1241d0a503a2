//! Names of keys, and the tokens of pairing, as people copy them from one host to the other.
//!
//! A fingerprint is the blake3 of a public key (its SubjectPublicKeyInfo, DER). It is written in base32 with three bytes
//! of checksum behind it, in groups, so that one that was copied badly is told from one of another key.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/// Letters between two dashes of a fingerprint.
const GROUP: usize = 7;
/// Checksum bytes of a fingerprint: 35 bytes are 56 letters.
const CHECK: usize = 3;
/// Checksum bytes of a token: 50 bytes are 80 letters.
const TOKEN_CHECK: usize = 2;
/// What a token begins with.
const TOKEN_PREFIX: &str = "bfs-pair-";

/// Names a public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

/// Why a text is no fingerprint or token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// Letters that do not belong there, or too many or few of them.
    #[error("this is not {0}: copy all of it")]
    Form(&'static str),
    /// The checksum says no.
    #[error("this {0} was not copied correctly: its checksum does not fit")]
    Check(&'static str),
}

impl Fingerprint {
    /// That of a public key.
    #[must_use]
    pub fn of_public_key(spki: &[u8]) -> Self {
        Self(*blake3::hash(spki).as_bytes())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = base32(&with_check::<CHECK>(&self.0));
        for (index, letter) in text.chars().enumerate() {
            if index > 0 && index % GROUP == 0 {
                f.write_str("-")?;
            }
            write!(f, "{letter}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let letters: String = text.chars().filter(|c| *c != '-').collect();
        checked::<32, CHECK>(&letters, "fingerprint").map(Self)
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = TextError;

    fn try_from(text: String) -> Result<Self, TextError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

/// What a primary needs to pair with a replayer, once.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The replayer's key.
    pub replayer: Fingerprint,
    /// Known to both.
    secret: [u8; 16],
}

impl Token {
    /// For the replayer with this key.
    #[must_use]
    pub const fn new(replayer: Fingerprint, secret: [u8; 16]) -> Self {
        Self { replayer, secret }
    }

    /// The key with which it is proven; the replayer keeps this instead of the token.
    #[must_use]
    pub fn proving_key(&self) -> [u8; 32] {
        blake3::derive_key("bfs 2026 pairing token v1", &self.secret)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("replayer", &self.replayer).finish_non_exhaustive()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = [&self.replayer.0[..], &self.secret].concat();
        write!(f, "{TOKEN_PREFIX}{}", base32(&with_check::<TOKEN_CHECK>(&bytes)))
    }
}

impl FromStr for Token {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let letters = text.strip_prefix(TOKEN_PREFIX).ok_or(TextError::Form("a token"))?;
        let bytes = checked::<48, TOKEN_CHECK>(letters, "token")?;
        let (replayer, secret) = bytes.split_at(32);
        let part = "the lengths add up";
        Ok(Self::new(Fingerprint(replayer.try_into().expect(part)), secret.try_into().expect(part)))
    }
}

fn with_check<const N: usize>(bytes: &[u8]) -> Vec<u8> {
    let mut all = bytes.to_vec();
    all.extend_from_slice(&blake3::hash(bytes).as_bytes()[..N]);
    all
}

fn checked<const LEN: usize, const N: usize>(
    letters: &str,
    what: &'static str,
) -> Result<[u8; LEN], TextError> {
    let all = unbase32(letters).filter(|all| all.len() == LEN + N).ok_or(TextError::Form(what))?;
    let bytes: [u8; LEN] = all[..LEN].try_into().map_err(|_| TextError::Form(what))?;
    if with_check::<N>(&bytes) == all { Ok(bytes) } else { Err(TextError::Check(what)) }
}

/// Bytes as letters, five bits each. Used for lengths that need no padding.
fn base32(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut have, mut bits) = (0u32, 0);
    for byte in bytes {
        have = have << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            out.push(char::from(ALPHABET[(have >> bits & 31) as usize]));
        }
        have &= (1 << bits) - 1;
    }
    debug_assert_eq!(bits, 0);
    out
}

/// The bytes of letters, upper or lower case; `None` for what [`base32`] does not make.
fn unbase32(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 5 / 8);
    let (mut have, mut bits) = (0u32, 0);
    for letter in text.bytes() {
        let value = ALPHABET.iter().position(|known| *known == letter.to_ascii_uppercase())?;
        have = have << 5 | value as u32;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            out.push((have >> bits & 0xff) as u8);
            have &= (1 << bits) - 1;
        }
    }
    (bits == 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_understood_and_never_changes_its_form() {
        let fingerprint = Fingerprint(std::array::from_fn(|i| i as u8));
        let text = fingerprint.to_string();
        assert_eq!(text, "AAAQEAY-EAUDAOC-AJBIFQY-DIOB4IB-CEQTCQK-RMFYYDE-NBWHA5D-YP6KKHJ");
        assert_eq!(text.parse(), Ok(fingerprint));
        assert_eq!(text.to_lowercase().replace('-', "").parse(), Ok(fingerprint));
        let token = Token::new(fingerprint, [0xa5; 16]);
        let text = token.to_string();
        assert_eq!(text.len(), TOKEN_PREFIX.len() + 80);
        assert_eq!(text.parse(), Ok(token));
    }

    #[test]
    fn every_letter_that_was_copied_badly_is_noticed() {
        let text = Fingerprint([7; 32]).to_string();
        for (at, letter) in text.char_indices().filter(|(_, letter)| *letter != '-') {
            let wrong = if letter == 'A' { "B" } else { "A" };
            let mut other = text.clone();
            other.replace_range(at..=at, wrong);
            assert_eq!(other.parse::<Fingerprint>(), Err(TextError::Check("fingerprint")), "{other}");
        }
        for bad in ["", "AAAA", &text[1..], &format!("{text}A"), &text.replace('A', "1"), "\u{e4}"] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
            assert!(bad.parse::<Token>().is_err(), "{bad}");
        }
    }
}
