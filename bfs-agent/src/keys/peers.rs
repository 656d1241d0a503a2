//! Whom a host trusts, and with what: the file `peers`. Pure.
//!
//! ```text
//! bfs peers 1
//! {"client":{...}}       a key that may connect to the replayer, and its rights
//! {"replayer":{...}}     the key that a replayer must have at an address
//! {"token":{...}}        a token of pairing that was given out
//! end 1a2b3c4d           CRC32C over all bytes before this line
//! ```
//! Only these commands and the replayer write it. What is not understood is refused, never left out: a line that is lost
//! would be a right too many or a revocation undone.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::Fingerprint;

const HEADER: &str = "bfs peers 1\n";
/// Longest file that is read.
pub(super) const BYTES_MAX: u64 = 4 << 20;
/// Most keys of each kind.
const KEYS_MAX: usize = 1024;
/// Most groups of one key's own: names that it takes and does nothing with are lost for others.
pub const OWN_GROUPS_MAX: usize = 64;
/// Most groups that one key is granted something on.
const GRANTS_MAX: usize = 256;
/// Most tokens.
const TOKENS_MAX: usize = 64;
/// How long a token is remembered after its end, to say so to whoever comes with it, in seconds.
const TOKEN_KNOWN_S: u64 = 24 * 3600;
/// In grants: the groups that this key wrote first, and new ones.
pub const OWN_GROUPS: &str = "*";

/// What a key may do with a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Right {
    /// Send its stream.
    Write,
    /// Read every checkpoint that is kept.
    Read,
    /// Change what is kept: merge checkpoints, take in those of another store.
    Administrate,
}

impl Right {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Write, Self::Read, Self::Administrate];

    /// As it is written on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Administrate => "administrate",
        }
    }
}

/// Rights by group; [`OWN_GROUPS`] stands for a key's own.
pub type Grants = BTreeMap<String, BTreeSet<Right>>;

/// A key that may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// It.
    pub key: Fingerprint,
    /// What the operator calls it.
    pub name: String,
    /// What it may do.
    pub grants: Grants,
    /// Groups that it was the first to write.
    pub bound: BTreeSet<String>,
    /// It may do nothing any more; kept so that it is told so.
    pub revoked: bool,
}

/// The key that a replayer must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replayer {
    /// As it is given to `--backup`.
    pub address: String,
    /// One of its keys: while it gets another one, it has two.
    pub key: Fingerprint,
}

/// A token of pairing that was given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenLine {
    /// What it is proven with ([`super::Token::proving_key`]).
    pub proving_key: [u8; 32],
    /// When it ends, in seconds since 1970.
    pub until_s: u64,
    /// What the key that comes with it is called.
    pub name: String,
    /// What that may do.
    pub grants: Grants,
    /// The key that came.
    pub used_by: Option<Fingerprint>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Client(Client),
    Replayer(Replayer),
    Token(TokenLine),
}

/// Why a file of peers is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeersError {
    /// Written by a newer release, or by somebody else.
    #[error("it does not begin with {:?}: another release wrote it, or it is something else", HEADER.trim_end())]
    Header,
    /// It was cut, or changed.
    #[error("it is damaged: its last line does not fit")]
    Damaged,
    /// A line that is not understood.
    #[error("line {0} is not understood: {1}")]
    Line(usize, String),
    /// More than may be.
    #[error("it has too many {0}")]
    TooMany(&'static str),
}

/// How a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody said anything about it.
    Unknown,
    /// It was revoked.
    Revoked,
    /// It may connect.
    Known,
}

/// Whether a key may do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allowed,
    /// It may, and the group is its own from then on: that has to be written down first.
    AllowedIfBound,
    /// It may not.
    Denied,
}

/// What came of a try to pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paired {
    /// The key is known now (or was already made known by the same token).
    Done,
    /// There is no such token.
    Unknown,
    /// It has ended.
    Expired,
    /// Another key came with it.
    Used,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// Who may connect.
    pub clients: Vec<Client>,
    /// What replayers must be.
    pub replayers: Vec<Replayer>,
    /// Tokens that were given out.
    pub tokens: Vec<TokenLine>,
}

impl Peers {
    /// The text of the file.
    #[must_use]
    pub fn encode(&self) -> String {
        let clients = self.clients.iter().cloned().map(Line::Client);
        let replayers = self.replayers.iter().cloned().map(Line::Replayer);
        let tokens = self.tokens.iter().cloned().map(Line::Token);
        let mut text = HEADER.to_owned();
        for line in clients.chain(replayers).chain(tokens) {
            text.push_str(&serde_json::to_string(&line).expect("texts and numbers can be written"));
            text.push('\n');
        }
        let crc = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("end {crc:08x}\n"));
        text
    }

    /// What a file says.
    ///
    /// # Errors
    /// [`PeersError`].
    pub fn decode(text: &str) -> Result<Self, PeersError> {
        if !text.starts_with(HEADER) {
            return Err(PeersError::Header);
        }
        let lines = text.strip_suffix('\n').and_then(|text| text.rfind('\n')).ok_or(PeersError::Damaged)?;
        let (lines, end) = text.split_at(lines + 1);
        if end != format!("end {:08x}\n", crc32c::crc32c(lines.as_bytes())) {
            return Err(PeersError::Damaged);
        }
        let mut peers = Self::default();
        for (index, line) in lines[HEADER.len()..].lines().enumerate() {
            match serde_json::from_str(line) {
                Ok(Line::Client(client)) if peers.client(client.key).is_some() => {
                    return Err(PeersError::Line(index + 2, "the key is there already".into()));
                }
                Ok(Line::Client(client)) => peers.clients.push(client),
                Ok(Line::Replayer(replayer)) => peers.replayers.push(replayer),
                Ok(Line::Token(token)) => peers.tokens.push(token),
                Err(error) => return Err(PeersError::Line(index + 2, error.to_string())),
            }
        }
        peers.check_size()?;
        Ok(peers)
    }

    /// Whether there are not too many lines.
    ///
    /// # Errors
    /// [`PeersError::TooMany`].
    pub fn check_size(&self) -> Result<(), PeersError> {
        let own = self.clients.iter().map(|client| client.bound.len()).max().unwrap_or(0);
        let granted = self.clients.iter().map(|client| client.grants.len()).max().unwrap_or(0);
        let counts = [
            (own, OWN_GROUPS_MAX, "groups of one key's own"),
            (granted, GRANTS_MAX, "groups on which one key has rights"),
            (self.clients.len(), KEYS_MAX, "keys that may connect"),
            (self.replayers.len(), KEYS_MAX, "keys of replayers"),
            (self.tokens.len(), TOKENS_MAX, "tokens that are out: wait until some have ended"),
        ];
        match counts.into_iter().find(|(count, max, _)| count > max) {
            Some((_, _, what)) => Err(PeersError::TooMany(what)),
            None => Ok(()),
        }
    }

    /// What is known of a key.
    #[must_use]
    pub fn client(&self, key: Fingerprint) -> Option<&Client> {
        self.clients.iter().find(|client| client.key == key)
    }

    /// Whether a key may connect at all.
    #[must_use]
    pub fn standing(&self, key: Fingerprint) -> Standing {
        match self.client(key) {
            None => Standing::Unknown,
            Some(client) if client.revoked => Standing::Revoked,
            Some(_) => Standing::Known,
        }
    }

    /// Whether a key has one of these rights on a group. `exists`: the store has a group of that name.
    #[must_use]
    pub fn may(&self, key: Fingerprint, group: &str, rights: &[Right], exists: bool) -> Verdict {
        let Some(client) = self.client(key).filter(|client| !client.revoked) else { return Verdict::Denied };
        let granted = |group: &str| {
            client.grants.get(group).is_some_and(|granted| rights.iter().any(|right| granted.contains(right)))
        };
        if granted(group) || (granted(OWN_GROUPS) && client.bound.contains(group)) {
            return Verdict::Allowed;
        }
        // A new name goes to whoever writes it first, unless the operator gave it to somebody.
        let is_free = !exists
            && !self.clients.iter().any(|other| {
                other.bound.contains(group) || (other.key != key && other.grants.contains_key(group))
            });
        if is_free && rights.contains(&Right::Write) && granted(OWN_GROUPS) {
            return Verdict::AllowedIfBound;
        }
        Verdict::Denied
    }

    /// Makes a group a key's own.
    pub fn bind(&mut self, key: Fingerprint, group: &str) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.key == key) {
            client.bound.insert(group.into());
        }
    }

    /// Lets a key do something, beside what it may already. One that was revoked may connect again.
    pub fn allow(&mut self, key: Fingerprint, name: Option<&str>, grants: &Grants) {
        let at = self.clients.iter().position(|client| client.key == key).unwrap_or_else(|| {
            let client = Client {
                key,
                name: String::new(),
                grants: Grants::new(),
                bound: BTreeSet::new(),
                revoked: false,
            };
            self.clients.push(client);
            self.clients.len() - 1
        });
        let client = &mut self.clients[at];
        // What it may do is what is said now, not what it once might.
        if std::mem::take(&mut client.revoked) {
            client.grants.clear();
        }
        if let Some(name) = name {
            client.name = name.into();
        }
        for (group, rights) in grants {
            client.grants.insert(group.clone(), rights.clone());
        }
    }

    /// Lets a key do what another one may, with the same groups for its own. False when that one may not connect.
    pub fn allow_as(&mut self, key: Fingerprint, old: Fingerprint) -> bool {
        let Some(old) = self.client(old).filter(|old| !old.revoked).cloned() else { return false };
        self.allow(key, Some(&old.name), &old.grants);
        for group in &old.bound {
            self.bind(key, group);
        }
        true
    }

    /// Lets a key do nothing any more. False when it is not known.
    pub fn revoke(&mut self, key: Fingerprint) -> bool {
        let client = self.clients.iter_mut().find(|client| client.key == key);
        client.map(|client| client.revoked = true).is_some()
    }

    /// The keys that a replayer at this address may have.
    #[must_use]
    pub fn replayer_keys(&self, address: &str) -> Vec<Fingerprint> {
        self.replayers.iter().filter(|r| r.address == address).map(|r| r.key).collect()
    }

    /// From now on a replayer at this address may have this key, too.
    pub fn trust(&mut self, address: &str, key: Fingerprint) {
        let replayer = Replayer { address: address.into(), key };
        if !self.replayers.contains(&replayer) {
            self.replayers.push(replayer);
        }
    }

    /// No replayer may have this key any more. False when none might.
    pub fn forget(&mut self, key: Fingerprint) -> bool {
        let before = self.replayers.len();
        self.replayers.retain(|replayer| replayer.key != key);
        self.replayers.len() < before
    }

    /// Notes a token. Those that ended long ago are forgotten; all that ended or were used, where there are too many.
    pub fn give_out(&mut self, token: TokenLine, now_s: u64) {
        self.tokens.retain(|old| old.until_s.saturating_add(TOKEN_KNOWN_S) > now_s);
        if self.tokens.len() >= TOKENS_MAX {
            self.tokens.retain(|old| old.until_s > now_s && old.used_by.is_none());
        }
        self.tokens.push(token);
    }

    /// Whether somebody may come with a token now.
    #[must_use]
    pub fn expects_somebody(&self, now_s: u64) -> bool {
        self.tokens.iter().any(|token| token.until_s.saturating_add(TOKEN_KNOWN_S) > now_s)
    }

    /// A key comes with the token that `is_it` recognises.
    pub fn pair(&mut self, key: Fingerprint, is_it: impl Fn(&[u8; 32]) -> bool, now_s: u64) -> Paired {
        let Some(token) = self.tokens.iter_mut().find(|token| is_it(&token.proving_key)) else {
            return Paired::Unknown;
        };
        match token.used_by {
            // It did not get the answer.
            Some(by) if by == key => return Paired::Done,
            Some(_) => return Paired::Used,
            None if token.until_s <= now_s => return Paired::Expired,
            None => token.used_by = Some(key),
        }
        let (name, grants) = (token.name.clone(), token.grants.clone());
        self.allow(key, Some(&name).filter(|name| !name.is_empty()).map(String::as_str), &grants);
        Paired::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Fingerprint = Fingerprint([1; 32]);
    const B: Fingerprint = Fingerprint([2; 32]);
    const NOW: u64 = 1_795_000_000;

    fn grants(all: &[(&str, &[Right])]) -> Grants {
        all.iter().map(|(group, rights)| ((*group).to_owned(), rights.iter().copied().collect())).collect()
    }

    fn some() -> Peers {
        let mut peers = Peers::default();
        peers.allow(A, Some("web"), &grants(&[(OWN_GROUPS, &[Right::Write, Right::Read])]));
        peers.bind(A, "web");
        peers.allow(B, None, &grants(&[("db", &[Right::Write])]));
        peers.revoke(B);
        peers.trust("tcp://backup:7400", B);
        let token = TokenLine {
            proving_key: [3; 32],
            until_s: NOW + 60,
            name: "db".into(),
            grants: grants(&[("db", &[Right::Read, Right::Administrate])]),
            used_by: None,
        };
        peers.give_out(token, NOW);
        peers
    }

    #[test]
    fn golden_text() {
        let mut peers = some();
        peers.tokens.clear();
        let wanted = concat!(
            "bfs peers 1\n",
            r#"{"client":{"key":"AEAQCAI-BAEAQCA-IBAEAQC-AIBAEAQ-CAIBAEA-QCAIBAE-AQCAIBA-EAZKFIE","name":"web","#,
            r#""grants":{"*":["write","read"]},"bound":["web"],"revoked":false}}"#,
            "\n",
            r#"{"client":{"key":"AIBAEAQ-CAIBAEA-QCAIBAE-AQCAIBA-EAQCAIB-AEAQCAI-BAEAQCA-IBOJVQL","name":"","#,
            r#""grants":{"db":["write"]},"bound":[],"revoked":true}}"#,
            "\n",
            r#"{"replayer":{"address":"tcp://backup:7400","#,
            r#""key":"AIBAEAQ-CAIBAEA-QCAIBAE-AQCAIBA-EAQCAIB-AEAQCAI-BAEAQCA-IBOJVQL"}}"#,
            "\nend ",
        );
        let text = peers.encode();
        assert!(text.starts_with(wanted), "{text}");
        assert_eq!(
            &text[wanted.len()..],
            format!("{:08x}\n", crc32c::crc32c(&text.as_bytes()[..wanted.len() - 4]))
        );
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else_is() {
        let peers = some();
        let text = peers.encode();
        assert_eq!(Peers::decode(&text), Ok(peers));
        assert_eq!(Peers::decode(&Peers::default().encode()), Ok(Peers::default()));
        for cut in 0..text.len() {
            assert!(Peers::decode(&text[..cut]).is_err(), "cut at {cut}");
        }
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone().into_bytes();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(flipped) = std::str::from_utf8(&flipped) {
                assert!(Peers::decode(flipped).is_err(), "bit {bit}");
            }
        }
        // Sound checksums, and still not ours.
        let sealed = |lines: &str| {
            let text = format!("bfs peers 1\n{lines}");
            Peers::decode(&format!("{text}end {:08x}\n", crc32c::crc32c(text.as_bytes())))
        };
        let line = text.lines().nth(1).unwrap();
        assert!(sealed(&format!("{line}\n")).is_ok());
        for wrong in [
            format!("{line}\n{line}\n"),
            format!("{}\n", line.replace("\"revoked\":false", "\"revoked\":false,\"more\":1")),
            format!("{}\n", line.replace(",\"revoked\":false", "")),
            format!("{}\n", line.replace("client", "friend")),
            format!("{}\n", line.replace("AEAQCAI", "AEAQCAJ")),
            "\n".to_owned(),
        ] {
            assert!(matches!(sealed(&wrong), Err(PeersError::Line(..))), "{wrong}");
        }
        assert_eq!(Peers::decode(&text.replace("bfs peers 1", "bfs peers 2")), Err(PeersError::Header));
    }

    #[test]
    fn a_key_may_what_it_was_granted_and_owns_what_it_wrote_first() {
        let write = &[Right::Write][..];
        let mut peers = some();
        assert_eq!(peers.may(A, "web", write, true), Verdict::Allowed);
        assert_eq!(peers.may(A, "new", write, false), Verdict::AllowedIfBound);
        // Reading makes nothing one's own; what is there already is somebody's.
        assert_eq!(peers.may(A, "new", &[Right::Read], false), Verdict::Denied);
        assert_eq!(peers.may(A, "old", write, true), Verdict::Denied);
        assert_eq!(peers.may(A, "web", &[Right::Administrate], true), Verdict::Denied);
        // What the operator gave to somebody is not free either, nor what is somebody's own.
        assert_eq!(peers.may(A, "db", write, false), Verdict::Denied);
        assert_eq!(peers.may(B, "db", write, true), Verdict::Denied, "revoked");
        peers.allow(B, None, &grants(&[(OWN_GROUPS, write)]));
        assert_eq!(peers.may(B, "db", write, true), Verdict::Denied, "that was before it was revoked");
        assert_eq!(peers.may(B, "web", write, false), Verdict::Denied);
        peers.allow(B, None, &grants(&[("web", write)]));
        assert_eq!(peers.may(B, "web", write, true), Verdict::Allowed);
        assert_eq!(peers.may(Fingerprint([9; 32]), "web", write, true), Verdict::Denied);
    }

    #[test]
    fn a_successor_may_what_the_old_key_may() {
        let mut peers = some();
        let new = Fingerprint([4; 32]);
        assert!(peers.allow_as(new, A) && peers.revoke(A));
        assert_eq!(peers.may(new, "web", &[Right::Read], true), Verdict::Allowed);
        assert_eq!(peers.standing(A), Standing::Revoked);
        assert!(!peers.allow_as(Fingerprint([5; 32]), A), "what is revoked has no successor");
        assert_eq!(peers.standing(Fingerprint([5; 32])), Standing::Unknown);
    }

    #[test]
    fn a_token_is_for_one_key_and_has_an_end() {
        let mut peers = some();
        let it = |key: &[u8; 32]| *key == [3; 32];
        let (new, other) = (Fingerprint([4; 32]), Fingerprint([5; 32]));
        assert_eq!(peers.clone().pair(new, it, NOW + 60), Paired::Expired);
        assert_eq!(peers.pair(new, |_| false, NOW), Paired::Unknown);
        assert_eq!(peers.standing(new), Standing::Unknown);
        assert_eq!(peers.pair(new, it, NOW), Paired::Done);
        assert_eq!(peers.client(new).unwrap().name, "db");
        assert_eq!(peers.may(new, "db", &[Right::Read], true), Verdict::Allowed);
        assert_eq!(peers.pair(other, it, NOW), Paired::Used);
        // The answer was lost: the same key may ask again, but does not come back from a revocation that way.
        assert_eq!(peers.pair(new, it, NOW + 600), Paired::Done);
        peers.revoke(new);
        assert_eq!(peers.pair(new, it, NOW), Paired::Done);
        assert_eq!(peers.standing(new), Standing::Revoked);
        assert!(peers.expects_somebody(NOW + 600) && !peers.expects_somebody(NOW + 2 * TOKEN_KNOWN_S));
    }

    #[test]
    fn nothing_grows_without_a_bound() {
        let mut peers = some();
        for number in 0..OWN_GROUPS_MAX {
            assert_eq!(peers.check_size(), Ok(()));
            peers.bind(A, &format!("group-{number}"));
        }
        assert!(matches!(peers.check_size(), Err(PeersError::TooMany(_))));
        assert!(Peers::decode(&peers.encode()).is_err());
        let mut peers = some();
        let token = peers.tokens[0].clone();
        for _ in 1..TOKENS_MAX {
            peers.give_out(TokenLine { used_by: Some(A), ..token.clone() }, NOW);
        }
        peers.give_out(token.clone(), NOW);
        assert_eq!(peers.tokens, [token.clone(), token.clone()], "used ones make room");
        for _ in 0..TOKENS_MAX {
            peers.give_out(token.clone(), NOW);
        }
        assert!(peers.check_size().is_err(), "those that are out do not");
    }
}
