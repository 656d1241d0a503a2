//! Which key may do what in this store, and which connections it has.
//!
//! What counts is the folder of keys, which commands change while the replayer runs. It is looked at when a command says so
//! (`ReadKeys`), and now and then. A connection of a key of which anything changed is ended at once, whatever it is doing;
//! an agent comes back and finds out what is new. So rights that were read once hold for as long as a connection stands.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bfs_common::wire::{Frame, Refusal};
use rustls::ServerConfig;
use tokio::sync::watch;

use crate::keys::peers::{Client, Grants, Paired, Peers, Right, Standing, Verdict};
use crate::keys::{Fingerprint, Folder, KeyError, Stamp, now_s};
use crate::net::{pairing, tls};

/// Connections of one key.
const OF_ONE_KEY_MAX: usize = 16;
/// Between two looks at the folder of keys.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long connections that are to end are waited for.
const END_MAX: Duration = Duration::from_secs(5);

/// What a frame needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need<'a> {
    /// Nothing but a connection.
    Nothing,
    /// A peer on this host.
    SameHost,
    /// One of these rights on a group.
    Group(&'a str, &'static [Right]),
    /// To write a group and to read it.
    WriteAndRead(&'a str),
    /// To become the writer of a group.
    ToWrite(&'a str),
    /// The same, or to administrate it.
    ToReceive(&'a str),
    /// To be the writer of a group.
    Writer,
    /// To say which group is meant.
    Name,
}

/// What a frame needs. Each frame is named, so that a new one is not forgotten.
#[must_use]
pub fn need(frame: &Frame) -> Need<'_> {
    // A primary compares what it has sent; that gives nothing away but to whom has it.
    const COMPARE: &[Right] = &[Right::Write, Right::Read];
    match frame {
        Frame::Hello { group, .. } => Need::ToWrite(group),
        Frame::Records { .. }
        | Frame::Packed { .. }
        | Frame::GetCatalog
        | Frame::Bye
        | Frame::ProcessBlocks { .. }
        | Frame::ProcessBytes
        | Frame::ProcessEnd => Need::Writer,
        Frame::PutProcess { group, .. } => Need::Group(group, &[Right::Write]),
        Frame::GetManifest { group, .. } | Frame::GetDigests { group, .. } => Need::Group(group, COMPARE),
        Frame::GetDamage { group, heal: false, .. } => Need::Group(group, COMPARE),
        Frame::GetDamage { group, heal: true, .. } => Need::Group(group, &[Right::Write]),
        Frame::GetGenerations { group }
        | Frame::GetTree { group, .. }
        | Frame::GetContents { group, .. }
        | Frame::GetChanges { group, .. }
        | Frame::GetDifferences { group, .. }
        | Frame::GetVersions { group, .. }
        | Frame::GetTransfer { group, .. }
        | Frame::Look { group, .. } => Need::Group(group, &[Right::Read]),
        Frame::GetNewest { group, .. } => Need::WriteAndRead(group),
        // Memory has what no file has: keys, passwords.
        Frame::GetProcess { group, .. }
        | Frame::Merge { group, .. }
        | Frame::Promote { group, .. }
        | Frame::PromoteStep { group, .. } => Need::Group(group, &[Right::Administrate]),
        // What comes is a checkpoint like one of an agent's stream.
        Frame::Receive { group: Some(group), .. } => Need::ToReceive(group),
        // The name in the stream is known only when all of it is there.
        Frame::Receive { group: None, .. } => Need::Name,
        Frame::ReadKeys | Frame::GetPlaces { .. } => Need::SameHost,
        Frame::GetStatus | Frame::Ping(_) | Frame::Pong(_) => Need::Nothing,
        // Those that only a replayer sends are refused as such.
        Frame::Welcome { .. }
        | Frame::Ack { .. }
        | Frame::Refused(_)
        | Frame::Catalog { .. }
        | Frame::Manifest { .. }
        | Frame::Generations { .. }
        | Frame::Tree { .. }
        | Frame::Content { .. }
        | Frame::Change { .. }
        | Frame::Newest { .. }
        | Frame::Differences { .. }
        | Frame::Versions { .. }
        | Frame::Transfer { .. }
        | Frame::Received { .. }
        | Frame::Merged { .. }
        | Frame::Promoted { .. }
        | Frame::Places { .. }
        | Frame::Seen(_)
        | Frame::Digests { .. }
        | Frame::Damage { .. }
        | Frame::KeysRead { .. }
        | Frame::ProcessBegun
        | Frame::ProcessWanted
        | Frame::ProcessKept
        | Frame::ProcessPiece { .. }
        | Frame::Status { .. } => Need::Nothing,
    }
}

/// What TLS needs, with the present key of the host.
#[derive(Debug)]
struct Configs {
    frames: Arc<ServerConfig>,
    pairing: Arc<ServerConfig>,
}

/// See the module.
#[derive(Debug)]
pub struct Access {
    folder: Folder,
    peers: watch::Sender<Arc<Peers>>,
    stamps: Mutex<[Option<Stamp>; 2]>,
    configs: Mutex<Configs>,
    live: watch::Sender<BTreeMap<u64, Fingerprint>>,
}

impl Access {
    /// With the keys of this folder; the host's own is made if there is none.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(folder: Folder) -> Result<Arc<Self>, KeyError> {
        let (stamps, peers) = watch_folder(&folder)?;
        let peers = watch::Sender::new(Arc::new(peers));
        let configs = Mutex::new(configs(&folder, &peers)?);
        Ok(Arc::new(Self {
            folder,
            peers,
            stamps: Mutex::new(stamps),
            configs,
            live: watch::Sender::new(BTreeMap::new()),
        }))
    }

    /// Looks at the folder. What cannot be understood changes nothing. Blocks on the disk.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn look(&self) -> Result<(), KeyError> {
        let mut known = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        if self.folder.stamps() == *known {
            return Ok(());
        }
        let (stamps, peers) = watch_folder(&self.folder)?;
        let configs = configs(&self.folder, &self.peers)?;
        *self.configs.lock().unwrap_or_else(PoisonError::into_inner) = configs;
        self.peers.send_replace(Arc::new(peers));
        *known = stamps;
        Ok(())
    }

    /// Looks at the folder now and then, for ever.
    pub async fn look_now_and_then(self: Arc<Self>) {
        let mut said = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let access = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || access.look()).await;
            let wrong = match looked {
                Ok(looked) => looked.err().map(|error| error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if wrong != said
                && let Some(wrong) = &wrong
            {
                tracing::error!("keys count as they were before: {wrong}");
            }
            said = wrong;
        }
    }

    /// Looks at the folder for a command, and waits until all connections have ended that have to; how many these were.
    ///
    /// # Errors
    /// The refusal for the command.
    pub async fn read_keys(self: Arc<Self>) -> Result<u64, Refusal> {
        let before = self.live.borrow().clone();
        let old = self.peers.borrow().clone();
        let access = Arc::clone(&self);
        let looked = tokio::task::spawn_blocking(move || access.look()).await;
        looked
            .map_err(|e| Refusal::Store(e.to_string()))?
            .map_err(|e| Refusal::Store(format!("the keys cannot be read, and count as before: {e}")))?;
        let new = self.peers.borrow().clone();
        let ending: Vec<u64> = before
            .into_iter()
            .filter(|(_, key)| rights(&old, *key) != rights(&new, *key))
            .map(|(number, _)| number)
            .collect();
        let mut live = self.live.subscribe();
        let gone = live.wait_for(|live| !ending.iter().any(|number| live.contains_key(number)));
        match tokio::time::timeout(END_MAX, gone).await {
            Ok(_) => Ok(ending.len() as u64),
            Err(_) => Err(Refusal::Store("connections of a key that was changed do not end".into())),
        }
    }

    /// What TLS needs for this protocol.
    #[must_use]
    pub fn config(&self, protocol: &[u8]) -> Arc<ServerConfig> {
        let configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody is asked to prove a token where none is out.
        let pairs = protocol == tls::PAIRING && self.peers.borrow().expects_somebody(now_s());
        if pairs { configs.pairing.clone() } else { configs.frames.clone() }
    }

    /// A key comes with a proof. Blocks on the disk; when it returns `Done` the key is known, durably.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn pair(
        &self,
        key: Fingerprint,
        proof: blake3::Hash,
        channel: &[u8; 32],
    ) -> Result<Paired, KeyError> {
        // In constant time, as blake3's hashes are compared.
        let is_it = |proving: &[u8; 32]| pairing::proof(proving, channel) == proof;
        let paired = self.folder.change(|peers| peers.pair(key, is_it, now_s()))?;
        self.look()?;
        Ok(paired)
    }

    /// A connection of a key begins.
    ///
    /// # Errors
    /// The refusal, when the key was changed meanwhile or has too many.
    pub fn enter(self: &Arc<Self>, number: u64, key: Fingerprint) -> Result<Entered, Refusal> {
        // The receiver first: what changes from here on is noticed.
        let peers = self.peers.subscribe();
        let rights = rights(&peers.borrow(), key).ok_or(Refusal::KeyChanged)?;
        let mut has_room = false;
        self.live.send_modify(|live| {
            has_room = live.values().filter(|of| **of == key).count() < OF_ONE_KEY_MAX;
            if has_room {
                live.insert(number, key);
            }
        });
        if !has_room {
            return Err(Refusal::Store(format!("this host has {OF_ONE_KEY_MAX} connections already")));
        }
        Ok(Entered { access: Arc::clone(self), number, key, rights, peers })
    }
}

/// What counts for a connection of a key; none if it may not be there. That a group becomes its own is no change.
fn rights(peers: &Peers, key: Fingerprint) -> Option<Grants> {
    peers.client(key).filter(|client| !client.revoked).map(|Client { grants, .. }| grants.clone())
}

/// The stamps are older than what was read: a change in between is found the next time.
fn watch_folder(folder: &Folder) -> Result<([Option<Stamp>; 2], Peers), KeyError> {
    // First of all: the host's key is made, if it is missing.
    folder.host_key()?;
    Ok((folder.stamps(), folder.peers()?))
}

fn configs(folder: &Folder, peers: &watch::Sender<Arc<Peers>>) -> Result<Configs, KeyError> {
    let key = folder.host_key()?;
    let known = peers.subscribe();
    let make = |config: Result<ServerConfig, rustls::Error>| {
        config.map(Arc::new).map_err(|e| KeyError::Key { path: folder.path().into(), why: e.to_string() })
    };
    Ok(Configs {
        frames: make(tls::server_config(&key, move |key| known.borrow().standing(key), tls::FRAMES))?,
        // Whoever comes proves a token next, and gets nothing but the answer to that.
        pairing: make(tls::server_config(&key, |_| Standing::Known, tls::PAIRING))?,
    })
}

/// A connection of a key, for as long as it stands.
#[derive(Debug)]
pub struct Entered {
    access: Arc<Access>,
    number: u64,
    key: Fingerprint,
    rights: Grants,
    peers: watch::Receiver<Arc<Peers>>,
}

impl Entered {
    /// Comes back when something about the key is changed.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + 'static {
        let (mut peers, key, before) = (self.peers.clone(), self.key, self.rights.clone());
        async move {
            // There is an end of changes only with the replayer's.
            let _ = peers.wait_for(|peers| rights(peers, key).as_ref() != Some(&before)).await;
        }
    }

    /// Whether the key has one of these rights on a group that the store has.
    #[must_use]
    pub fn may(&self, group: &str, rights: &[Right]) -> bool {
        self.peers.borrow().may(self.key, group, rights, true) == Verdict::Allowed
    }

    /// Whether the key may write a group of a valid name; a new one becomes its own, durably. Blocks on the disk.
    ///
    /// # Errors
    /// The refusal for the agent.
    pub fn may_write(&self, group: &str, exists: bool) -> Result<(), Refusal> {
        let write = &[Right::Write];
        // Not in a match on the expression itself: that would hold the lock of the peers while they are changed.
        let verdict = self.peers.borrow().may(self.key, group, write, exists);
        let verdict = match verdict {
            Verdict::AllowedIfBound => {
                let bind = |peers: &mut Peers| {
                    // Somebody else may have been faster.
                    let verdict = peers.may(self.key, group, write, exists);
                    if verdict == Verdict::AllowedIfBound {
                        peers.bind(self.key, group);
                    }
                    verdict
                };
                let bound = self.access.folder.change(bind).and_then(|verdict| {
                    self.access.look()?;
                    Ok(verdict)
                });
                bound.map_err(|e| Refusal::Store(e.to_string()))?
            }
            verdict => verdict,
        };
        if verdict == Verdict::Denied { Err(self.denied(group, Right::Write)) } else { Ok(()) }
    }

    /// The refusal of what the key may not do.
    #[must_use]
    pub fn denied(&self, group: &str, right: Right) -> Refusal {
        Refusal::NotAllowed { key: self.key.to_string(), group: group.into(), right: right.name().into() }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.access.live.send_modify(|live| {
            live.remove(&self.number);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::peers::{OWN_GROUPS, OWN_GROUPS_MAX};

    const A: Fingerprint = Fingerprint([1; 32]);
    const B: Fingerprint = Fingerprint([2; 32]);

    fn own() -> Grants {
        Grants::from([(OWN_GROUPS.to_owned(), [Right::Write, Right::Read].into())])
    }

    fn access() -> (tempfile::TempDir, Arc<Access>) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("keys"));
        folder
            .change(|peers| {
                peers.allow(A, None, &own());
                peers.allow(B, None, &own());
            })
            .unwrap();
        let access = Access::open(folder).unwrap();
        (dir, access)
    }

    #[tokio::test]
    async fn a_connection_ends_when_its_key_is_changed_and_no_other_does() {
        let (_dir, access) = access();
        let (a, b) = (access.enter(1, A).unwrap(), access.enter(2, B).unwrap());
        assert!(access.enter(3, Fingerprint([9; 32])).is_err());
        let changed = a.changed();
        let ended = tokio::spawn(async move {
            changed.await;
            drop(a);
        });
        access.folder.change(|peers| peers.revoke(A)).unwrap();
        assert_eq!(Arc::clone(&access).read_keys().await, Ok(1));
        ended.await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), b.changed()).await.is_err());
        assert_eq!(access.enter(4, A).unwrap_err(), Refusal::KeyChanged);
        // Other rights are a change, a group of its own is not.
        b.may_write("new", false).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), b.changed()).await.is_err());
        access
            .folder
            .change(|peers| peers.allow(B, None, &Grants::from([("db".into(), [Right::Read].into())])))
            .unwrap();
        access.look().unwrap();
        b.changed().await;
    }

    #[test]
    fn a_new_group_is_of_whoever_writes_it_first() {
        let (_dir, access) = access();
        let (a, b) = (access.enter(1, A).unwrap(), access.enter(2, B).unwrap());
        a.may_write("g", false).unwrap();
        a.may_write("g", true).unwrap();
        assert!(a.may("g", &[Right::Read]) && !b.may("g", &[Right::Read]));
        // Also when the store does not have it yet: it was about to be made.
        for exists in [false, true] {
            let refusal = b.may_write("g", exists).unwrap_err();
            assert_eq!(
                refusal,
                Refusal::NotAllowed { key: B.to_string(), group: "g".into(), right: "write".into() }
            );
        }
        // Durably.
        let again = Access::open(access.folder.clone()).unwrap();
        assert!(again.enter(1, A).unwrap().may("g", &[Right::Write]));
    }

    #[test]
    fn one_key_has_not_all_the_room() {
        let (_dir, access) = access();
        {
            let a = access.enter(0, A).unwrap();
            for number in 0..OWN_GROUPS_MAX {
                a.may_write(&format!("group-{number}"), false).unwrap();
            }
            assert!(matches!(a.may_write("one-more", false), Err(Refusal::Store(_))));
            a.may_write("group-1", false).unwrap();
            access.enter(1, B).unwrap().may_write("one-more", false).unwrap();
        }
        let mut all: Vec<_> =
            (0..OF_ONE_KEY_MAX as u64).map(|number| access.enter(number, A).unwrap()).collect();
        assert!(matches!(access.enter(100, A), Err(Refusal::Store(_))));
        access.enter(101, B).unwrap();
        all.pop();
        access.enter(102, A).unwrap();
    }

    #[test]
    fn keys_that_cannot_be_read_change_nothing() {
        let (_dir, access) = access();
        let path = access.folder.path().join("peers");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(access.look().is_err());
        access.enter(1, A).unwrap();
        std::fs::write(&path, &text).unwrap();
        access.look().unwrap();
    }
}
