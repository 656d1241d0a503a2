//! `pair` and `key`: this host's key, and those of the replayers that it trusts.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::commands::print;
use crate::keys::{self, Fingerprint, Folder, KeyError, Token};
use crate::net::{self, Destination};
use crate::primary::failure::{Failure, Kind};
use crate::primary::ship::ShipError;

/// Where the keys are.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// Folder with this host's key and the replayers that it trusts (for tcp://)
    #[arg(long, value_name = "DIR", default_value = keys::DEFAULT)]
    keys: PathBuf,
}

impl Place {
    pub(super) fn folder(&self) -> Folder {
        Folder::new(&self.keys)
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// List the keys that replayers must have, by address
    List,
    /// From now on the replayer at this address may have this key (what `bfs-replayer key` prints there)
    Trust {
        /// As it is given to --backup
        #[arg(value_name = "tcp://HOST:PORT")]
        replayer: Destination,
        /// Of its key
        #[arg(value_name = "FINGERPRINT")]
        key: Fingerprint,
    },
    /// From now on no replayer may have this key
    Forget {
        /// Of the key
        #[arg(value_name = "FINGERPRINT")]
        key: Fingerprint,
    },
    /// Make a second key for this host, and print it; with --use it becomes the one that is used
    Rotate {
        /// Use it from now on, also for what runs: with its next connection
        #[arg(long)]
        r#use: bool,
    },
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        let hint = "give another folder with --keys DIR, or mend this one";
        Self::new(Kind::Usage, error.to_string(), hint)
    }
}

pub(super) fn pair(folder: &Folder, replayer: &Destination, token: &Token) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Kind::Other, format!("cannot start an event loop: {e}"), ""))?;
    let paired = runtime.block_on(net::pair(replayer, token, folder));
    let key = paired.map_err(|error| Failure::from(ShipError::Connect(error)))?;
    print(&format!("paired: {replayer} knows this host's key {}", key.fingerprint()))?;
    Ok(0)
}

pub(super) fn key(folder: &Folder, what: Option<KeyCommand>) -> Result<u8, Failure> {
    match what {
        None => print(&folder.host_key()?.fingerprint().to_string())?,
        Some(KeyCommand::List) => {
            for replayer in folder.peers()?.replayers {
                print(&format!("{}  {}", replayer.key, replayer.address))?;
            }
        }
        Some(KeyCommand::Trust { replayer, key }) => {
            let Destination::Tcp(_) = replayer else {
                return Err(Failure::new(
                    Kind::Usage,
                    format!("{replayer} needs no key"),
                    "keys are for tcp://HOST:PORT only",
                ));
            };
            folder.change(|peers| peers.trust(&replayer.to_string(), key))?;
        }
        Some(KeyCommand::Forget { key }) => {
            if !folder.change(|peers| peers.forget(key))? {
                let message = format!("no replayer has the key {key}");
                return Err(Failure::new(Kind::Usage, message, "bfs-agent key list"));
            }
        }
        Some(KeyCommand::Rotate { r#use: false }) => {
            print(&folder.next_key()?.fingerprint().to_string())?;
        }
        Some(KeyCommand::Rotate { r#use: true }) => {
            print(&folder.use_next_key()?.fingerprint().to_string())?;
        }
    }
    Ok(0)
}
