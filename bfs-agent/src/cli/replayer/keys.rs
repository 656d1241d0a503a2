//! `pair` and `key`: the replayer's key, and those that may come in.

use std::path::PathBuf;
use std::time::Duration;

use bfs_common::wire::Frame;
use clap::{Args, Subcommand};

use crate::backup::{places, store, store_keys};
use crate::cli::{say, sayln};
use crate::keys::peers::{Client, Grants, OWN_GROUPS, Right, TokenLine};
use crate::keys::{Fingerprint, Folder, Token, now_s, random};
use crate::net::{self, ConnectError, Destination};
use crate::primary::schedule::parse_time;

/// How long a replayer that runs may take to end the connections of a key.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Whose keys.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// Folder of the store
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Folder of keys, if `serve` was given another one [default: STORE/keys]
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,
}

impl Place {
    fn folder(&self) -> anyhow::Result<Folder> {
        store::check_format(&self.store)?;
        Ok(self.keys.as_ref().map_or_else(|| store_keys(&self.store), Folder::new))
    }

    /// A replayer that runs looks at its keys; how many connections it ended, if there is one.
    fn tell(&self) -> anyhow::Result<Option<u64>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = Destination::Unix(net::store_socket(&self.store));
        runtime.block_on(async {
            let asked = async {
                let mut connection = net::connect(&address, &Folder::default()).await?;
                connection.writer.send(&Frame::ReadKeys, b"").await?;
                match connection.answer().await? {
                    (Frame::KeysRead { ended }, _) => anyhow::Ok(Some(ended)),
                    _ => anyhow::bail!("{address} did not answer what was asked"),
                }
            };
            match tokio::time::timeout(ANSWER_MAX, asked).await {
                Ok(Err(error)) => match error.downcast_ref::<ConnectError>() {
                    Some(ConnectError::Unreachable { .. }) => Ok(None),
                    _ => Err(error.context(
                        "the change is written down, but the replayer that runs did not take it up",
                    )),
                },
                Ok(answer) => answer,
                Err(_) => anyhow::bail!(
                    "the change is written down, but the replayer that runs did not say so in time"
                ),
            }
        })
    }
}

/// What a key may do.
#[derive(Debug, Args)]
pub(super) struct May {
    /// A group that the key may have to do with, whoever wrote it (may be repeated) [default: new ones, which are its
    /// own from then on]
    #[arg(long, value_name = "NAME", value_parser = parse_group)]
    group: Vec<String>,
    /// What it may do with these groups: a comma list of write (send its stream), read (read what is kept), administrate
    /// (merge checkpoints, receive those of another store)
    #[arg(long, value_name = "RIGHTS", value_delimiter = ',', value_parser = parse_right, default_value = "write,read")]
    may: Vec<Right>,
}

impl May {
    fn grants(&self) -> Grants {
        let rights = self.may.iter().copied().collect::<std::collections::BTreeSet<_>>();
        if self.group.is_empty() {
            return Grants::from([(OWN_GROUPS.to_owned(), rights)]);
        }
        self.group.iter().map(|group| (group.clone(), rights.clone())).collect()
    }
}

#[derive(Debug, Args)]
pub(super) struct Pair {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    may: May,
    /// What `key list` calls the host
    #[arg(long, value_name = "TEXT", value_parser = parse_name, default_value = "")]
    name: String,
    /// For how long the token is good
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1h")]
    valid: Duration,
}

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// List the keys that may come in, what they may do, and the groups that are theirs
    List,
    /// Let a key come in without a token (what `bfs-agent key` prints on its host), or give it more rights
    Allow {
        /// Of the key
        #[arg(value_name = "FINGERPRINT")]
        key: Fingerprint,
        #[command(flatten)]
        may: May,
        /// What `key list` calls it
        #[arg(long, value_name = "TEXT", value_parser = parse_name)]
        name: Option<String>,
        /// It may do what this key may do, and has the same groups: when a host gets another key
        #[arg(long = "as", value_name = "FINGERPRINT", conflicts_with_all = ["group", "may", "name"])]
        successor_of: Option<Fingerprint>,
    },
    /// Let a key do nothing any more; its connections end at once
    Revoke {
        /// Of the key
        #[arg(value_name = "FINGERPRINT")]
        key: Fingerprint,
    },
    /// Make a second key for the replayer, and print it; with --use it becomes the one that is used
    Rotate {
        /// Use it from now on, also in a replayer that runs; connections that stand go on
        #[arg(long)]
        r#use: bool,
    },
}

/// Prints a token.
pub(super) fn pair(pair: &Pair) -> anyhow::Result<()> {
    let folder = pair.place.folder()?;
    let replayer = folder.host_key()?.fingerprint();
    let token = Token::new(replayer, random()?);
    let now = now_s();
    let line = TokenLine {
        proving_key: token.proving_key(),
        until_s: now.saturating_add(pair.valid.as_secs()),
        name: pair.name.clone(),
        grants: pair.may.grants(),
        used_by: None,
    };
    folder.change(|peers| peers.give_out(line, now))?;
    if pair.place.tell()?.is_none() {
        eprintln!("no replayer runs for this store: start one with --listen tcp://ADDRESS:PORT");
    }
    eprintln!(
        "on the other host, once, with the address of this one:\n  bfs-agent pair tcp://HOST:PORT {token}"
    );
    sayln!("{token}")?;
    Ok(())
}

pub(super) fn key(place: &Place, what: Option<KeyCommand>) -> anyhow::Result<()> {
    let folder = place.folder()?;
    match what {
        None => sayln!("{}", folder.host_key()?.fingerprint())?,
        Some(KeyCommand::List) => say(format_args!("{}", table(&folder.peers()?.clients)))?,
        Some(KeyCommand::Allow { key, may, name, successor_of }) => {
            let old = successor_of;
            let done = folder.change(|peers| match old {
                Some(old) => peers.allow_as(key, old),
                None => {
                    peers.allow(key, name.as_deref(), &may.grants());
                    true
                }
            })?;
            if let (false, Some(old)) = (done, old) {
                anyhow::bail!(
                    "the key {old} may not come in, so it has no successor: `key list` shows those that may"
                );
            }
            place.tell()?;
        }
        Some(KeyCommand::Revoke { key }) => {
            anyhow::ensure!(
                folder.change(|peers| peers.revoke(key))?,
                "the key {key} is not known: `key list` shows those that are"
            );
            match place.tell()? {
                Some(ended) => sayln!("revoked; {ended} connections ended")?,
                None => sayln!("revoked; no replayer runs for this store")?,
            }
        }
        Some(KeyCommand::Rotate { r#use: false }) => sayln!("{}", folder.next_key()?.fingerprint())?,
        Some(KeyCommand::Rotate { r#use: true }) => {
            let key = folder.use_next_key()?;
            place.tell()?;
            sayln!("{}", key.fingerprint())?;
        }
    }
    Ok(())
}

fn table(clients: &[Client]) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    if clients.is_empty() {
        out.push_str("no key may come in yet: `bfs-replayer pair` makes a token for one\n");
    }
    for client in clients {
        // Writing to a string does not fail.
        let _ =
            writeln!(out, "{}  {}{}", client.key, client.name, if client.revoked { "  REVOKED" } else { "" });
        for (group, rights) in &client.grants {
            let group = if group == OWN_GROUPS { "its own groups" } else { group };
            let rights: Vec<_> = rights.iter().map(|right| right.name()).collect();
            let _ = writeln!(out, "  may {} {group}", rights.join(", "));
        }
        if !client.bound.is_empty() {
            let own: Vec<_> = client.bound.iter().map(String::as_str).collect();
            let _ = writeln!(out, "  its own are {}", own.join(", "));
        }
    }
    out
}

fn parse_group(text: &str) -> Result<String, String> {
    if places::group_name_is_valid(text) {
        return Ok(text.into());
    }
    Err("letters, digits, `.`, `_` and `-`, not beginning with a dot".into())
}

fn parse_right(text: &str) -> Result<Right, String> {
    let right = Right::ALL.into_iter().find(|right| right.name() == text);
    right.ok_or_else(|| "write, read or administrate".into())
}

fn parse_name(text: &str) -> Result<String, String> {
    if text.len() <= 64 && !text.chars().any(char::is_control) {
        return Ok(text.into());
    }
    Err("at most 64 letters".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_what_it_may() {
        let client = Client {
            key: Fingerprint([1; 32]),
            name: "web".into(),
            grants: Grants::from([
                (OWN_GROUPS.into(), [Right::Write, Right::Read].into()),
                ("db".into(), [Right::Read].into()),
            ]),
            bound: ["web".into()].into(),
            revoked: true,
        };
        assert_eq!(
            table(&[client]),
            "AEAQCAI-BAEAQCA-IBAEAQC-AIBAEAQ-CAIBAEA-QCAIBAE-AQCAIBA-EAZKFIE  web  REVOKED\n  \
             may write, read its own groups\n  may read db\n  its own are web\n"
        );
    }
}
