//! What the destination says that it has, gathered beside the work of the session.
//!
//! A thread of its own asks, because the answer takes as long as reading the backup. What is gathered is
//! bounded; files beyond that are sent whole. So are all when the asking fails, or takes too long: nothing depends on it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::{ObjectId, Sequence};
use bfs_common::wire::DIGEST_BYTES;

use crate::generation::Client;
use crate::primary::engine::same::{Digest, Known};
use crate::primary::ship::Connect;

/// Most digests that are kept: 64 GiB of files, 256 MiB of memory.
const DIGESTS_MAX: usize = 16 << 20;

/// How long nothing may be said: the destination may be busy with a long step, and a checkpoint waits.
const SILENCE_MAX: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Gathered {
    files: HashMap<ObjectId, Vec<Digest>>,
    kept: usize,
    /// There was no room for all of this one.
    skipped: Option<ObjectId>,
    /// All of files before this one was said.
    at: ObjectId,
    /// When something was said last.
    heard: Instant,
    ended: bool,
}

impl Gathered {
    /// Nothing was said yet.
    fn new() -> Self {
        Self {
            files: HashMap::new(),
            kept: 0,
            skipped: None,
            at: ObjectId(0),
            heard: Instant::now(),
            ended: false,
        }
    }
}

/// See the module. Files that the destination does not know yet have numbers above `highest`.
#[derive(Debug)]
pub struct Answers {
    gathered: Arc<Mutex<Gathered>>,
    highest: ObjectId,
}

fn locked(gathered: &Mutex<Gathered>) -> MutexGuard<'_, Gathered> {
    gathered.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Answers {
    /// Asks for the state after a record.
    #[must_use]
    pub fn ask(connect: Connect, group: &str, position: Sequence, highest: ObjectId) -> Self {
        let gathered = Arc::new(Mutex::new(Gathered::new()));
        let (to, group) = (gathered.clone(), group.to_owned());
        let work = move || {
            let client = Client::open(connect());
            let asked = client.map_err(|e| e.to_string()).and_then(|mut client| {
                let said = client.digests(&group, position, |line| {
                    let mut to = locked(&to);
                    (to.at, to.heard) = (line.object, Instant::now());
                    let digests = line.digests.chunks_exact(DIGEST_BYTES);
                    if to.kept + digests.len() > DIGESTS_MAX {
                        to.skipped = Some(line.object);
                    }
                    if to.skipped != Some(line.object) {
                        to.kept += digests.len();
                        let digests = digests.map(|d| Digest::try_from(d).expect("as long as a digest"));
                        to.files.entry(line.object).or_default().extend(digests);
                    }
                });
                said.map_err(|e| e.to_string())
            });
            if let Err(e) = asked {
                tracing::warn!("the destination did not say what it has, so it is sent again: {e}");
            }
            locked(&to).ended = true;
        };
        // Without a thread everything is sent.
        if std::thread::Builder::new().name("known".into()).spawn(work).is_err() {
            locked(&gathered).ended = true;
        }
        Self { gathered, highest }
    }

    /// What is known of a file. It is given once.
    #[must_use]
    pub fn known(&self, object: ObjectId) -> Known {
        let mut gathered = locked(&self.gathered);
        if object > self.highest {
            return Known::Nothing;
        }
        if gathered.at <= object && !gathered.ended && gathered.heard.elapsed() < SILENCE_MAX {
            return Known::NotYet;
        }
        match gathered.files.remove(&object) {
            Some(digests) => {
                gathered.kept -= digests.len();
                Known::Digests(digests)
            }
            None => Known::Nothing,
        }
    }
}
