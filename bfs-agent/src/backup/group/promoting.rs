//! A backup becomes the primary: whoever wrote the group is fenced, in one transaction of the index, before anything
//! is given out.
//!
//! While that transaction is being made nobody writes ([`Promoting`]): an agent that comes meanwhile is told to
//! come again, and finds out then how it ended. One that failed may stand there all the same once the store is opened
//! again, and what would be confirmed meanwhile were lost then: until it is known, nobody writes either.

use std::sync::Arc;
use std::time::Duration;

use bfs_common::record::{CheckpointId, Epoch, GroupId, ObjectId, PathBytes};
use bfs_common::wire::{Frame, History, PromoteStage, Promoter, Refusal};

use super::super::error::BackupError;
use super::super::index::{GroupRow, HistoryRow};
use super::{Group, Slot, State, locked};
use crate::generation::wall_ns;
use crate::mutant::{self, Mutant};

/// An agent that was silent for so long does not answer any more; it pings each second.
const ANSWERS: Duration = Duration::from_secs(5);
/// How long a promotion waits for one before to have begun: a sync of the log and a transaction.
const BEGIN_WAIT: Duration = Duration::from_secs(10);
/// Longest name of a host, and longest path, in bytes.
const HOST_MAX: usize = 255;
const PATH_MAX: usize = 4096;
/// Between two notes that a fenced primary came.
const NOTE_EVERY_NS: i64 = 60_000_000_000;

/// Whether a promotion is being begun.
#[derive(Debug)]
pub(super) enum Promoting {
    No,
    /// Its transaction is being made.
    Begins,
    /// That failed, and nobody knows whether it stands; with whoever wrote before.
    InDoubt(Option<Slot>),
}

impl State {
    /// Whether a promotion is being begun: nobody writes.
    pub const fn is_promoting(&self) -> bool {
        !matches!(self.promoting, Promoting::No)
    }

    /// It is known how the promotion ended. `before` wrote, and writes again if nothing came of it.
    fn end_promoting(&mut self, before: Option<Slot>, begun: bool) {
        self.promoting = Promoting::No;
        let Some(before) = before else { return };
        if begun {
            before.fenced.notify_one();
        } else if self.slot.is_none() && Arc::strong_count(&before.fenced) > 1 {
            // Its connection may have ended meanwhile: then nobody would ever give the slot back.
            self.slot = Some(before);
        }
    }

    /// It is known, from the index, how it ended.
    fn end_promoting_with(&mut self, row: &GroupRow, before: Option<Slot>) {
        let had = self.histories.last().map(|row| row.history.history);
        self.know(row);
        let begun = self.histories.last().map(|row| row.history.history) != had;
        self.end_promoting(before, begun);
    }

    /// The newest promotion.
    pub fn history(&self) -> Option<&HistoryRow> {
        self.histories.last()
    }

    /// Why whoever holds an older epoch than the newest may not write.
    pub fn fenced(&self, epoch: Epoch) -> Refusal {
        match self.histories.iter().find(|row| row.epoch > epoch) {
            Some(row) => refusal(row, self.histories.last()),
            None => Refusal::Fenced { newest: self.granted },
        }
    }

    /// Why nothing of the primary before may follow the newest checkpoint: it was promoted, and is the last in common.
    pub fn promoted_at(&self, newest: Option<CheckpointId>) -> Option<Refusal> {
        let last =
            self.histories.last().filter(|last| newest.is_none_or(|newest| newest <= last.history.at))?;
        Some(refusal(last, Some(last)))
    }

    /// Whether this is the primary of the group. `first`: the one that began it.
    ///
    /// # Errors
    /// The refusal for its agent.
    pub fn admit_writer(&self, name: &str, first: GroupId, id: GroupId) -> Result<(), Refusal> {
        if mutant::is(Mutant::AdmitsFenced) {
            return Ok(());
        }
        let Some(last) = self.histories.last() else {
            return if id == first { Ok(()) } else { Err(Refusal::OtherGroup { name: name.into() }) };
        };
        if id == last.history.by.writer {
            return if last.history.stage == PromoteStage::Done {
                Ok(())
            } else {
                Err(Refusal::Store(
                    "it is being promoted, and that is not finished: `bfs-replayer promote`, as before, goes on with it"
                        .into(),
                ))
            };
        }
        // The last checkpoint that it has in common with the others is where it was fenced first.
        let was = self.histories.iter().rposition(|row| row.history.by.writer == id);
        match (was, id == first) {
            (Some(at), _) => Err(refusal(&self.histories[at + 1], Some(last))),
            (None, true) => Err(refusal(&self.histories[0], Some(last))),
            (None, false) => Err(Refusal::OtherGroup { name: name.into() }),
        }
    }

    /// Below which directory the new primary has what was promoted, as long as no checkpoint of it is applied.
    pub fn adopts(&self) -> Option<PathBytes> {
        let history = &self.histories.last()?.history;
        (self.applied.0 <= history.at).then(|| history.by.to.clone())
    }
}

/// What a fenced primary is told: the last checkpoint that it has in common, and who is the primary now.
fn refusal(fenced_by: &HistoryRow, last: Option<&HistoryRow>) -> Refusal {
    let (first, last) = (&fenced_by.history, &last.unwrap_or(fenced_by).history);
    Refusal::Promoted { at: first.at, since_ns: first.since_ns, host: last.by.host.clone() }
}

impl Group {
    /// Fences whoever writes the group, and begins the history of another primary; or finds that it has begun.
    ///
    /// # Errors
    /// Why not. Then nothing has changed, but an agent that was connected may have to connect again; or, where the disk
    /// failed, nobody knows, and nobody writes until that is known ([`Self::settle`]).
    pub async fn promote(self: &Arc<Self>, by: Promoter, force: bool) -> Result<Frame, Refusal> {
        if by.host.len() > HOST_MAX || by.to.0.len() > PATH_MAX || !by.to.as_path().is_absolute() {
            return Err(Refusal::Bad("a promotion needs the name of a host and an absolute path".into()));
        }
        if self.progress.borrow().confirmed == CheckpointId(0) {
            let why = format!("group {:?} has no confirmed checkpoint to promote", self.name);
            return Err(Refusal::Bad(why));
        }
        let group = self.clone();
        blocking(move || group.settle()).await??;
        self.until_begun().await;
        let before = {
            let mut state = self.state();
            if let Some(history) = self.begun(&state, &by) {
                return Ok(promoted(&state, history));
            }
            if state.is_promoting() {
                return Err(Refusal::Busy { name: self.name.clone() });
            }
            let answers = state.slot.as_ref().is_some_and(|slot| slot.pulse.silence() < ANSWERS);
            if answers && !force {
                return Err(Refusal::Attached { name: self.name.clone() });
            }
            state.promoting = Promoting::Begins;
            state.slot.take()
        };
        if let Err(refusal) = self.drain().await {
            self.state().end_promoting(before, false);
            self.slot_free.notify_waiters();
            return Err(refusal);
        }
        let at = self.progress.borrow().confirmed;
        let (group, wanted) = (self.clone(), by.clone());
        let begun = blocking(move || group.begin_history(at, wanted)).await;
        let begun = begun.and_then(|begun| begun.map_err(|error| Refusal::Store(error.to_string())));
        let why = match begun {
            Ok(row) => {
                self.state().end_promoting_with(&row, before);
                Refusal::Store("the index has not what was just written".into())
            }
            Err(why) if mutant::is(Mutant::ForgetsDoubt) => {
                self.state().end_promoting(before, false);
                why
            }
            Err(why) => {
                // It may stand all the same.
                self.state().promoting = Promoting::InDoubt(before);
                let group = self.clone();
                blocking(move || group.settle()).await??;
                why
            }
        };
        self.slot_free.notify_waiters();
        let state = self.state();
        self.begun(&state, &by).map_or(Err(why), |history| Ok(promoted(&state, history)))
    }

    /// The newest promotion, if it is this one, and nothing was written or confirmed since.
    fn begun(&self, state: &State, by: &Promoter) -> Option<History> {
        let row = state.history().filter(|row| row.history.by == *by)?;
        let stands =
            state.gate.position.epoch < row.epoch && row.history.at == self.progress.borrow().confirmed;
        stands.then(|| row.history.clone())
    }

    /// Finds out how a promotion ended of which that is not known. Blocks on the disk.
    ///
    /// # Errors
    /// If the disk fails still; nobody writes meanwhile.
    pub fn settle(&self) -> Result<(), Refusal> {
        if !matches!(self.state().promoting, Promoting::InDoubt(_)) {
            return Ok(());
        }
        let row = self.index.settled(&self.name).map_err(|error| {
            Refusal::Store(format!("{error}; until it is known whether it was promoted, nobody writes"))
        })?;
        let mut state = self.state();
        match std::mem::replace(&mut state.promoting, Promoting::No) {
            Promoting::InDoubt(before) => state.end_promoting_with(&row, before),
            // Somebody else found out meanwhile, and another one may be on its way.
            other => state.promoting = other,
        }
        drop(state);
        self.slot_free.notify_waiters();
        Ok(())
    }

    /// Waits, not for long, until a promotion has begun or not that somebody asked for who may be gone since.
    async fn until_begun(&self) {
        let deadline = tokio::time::Instant::now() + BEGIN_WAIT;
        loop {
            let free = self.slot_free.notified();
            if !self.state().is_promoting() || tokio::time::timeout_at(deadline, free).await.is_err() {
                return;
            }
        }
    }

    fn begin_history(&self, at: CheckpointId, by: Promoter) -> Result<GroupRow, BackupError> {
        let row = self.index.group(&self.name)?;
        let parent = row.histories.last().map_or(self.id.0, |row| row.history.history);
        let since_ns = wall_ns();
        // Epochs only go up, so it is another one than any of this store; and the rest tells stores apart.
        let mut hasher = blake3::Hasher::new_derive_key("bfs 2026 history v1");
        hasher.update(&parent).update(&row.granted.0.to_le_bytes()).update(&since_ns.to_le_bytes());
        hasher.update(&by.writer.0).update(by.host.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        let stage = PromoteStage::Fenced;
        let history = History { history: id, parent, at, since_ns, by, stage, refused_ns: None };
        self.index.begin_history(&self.name, history)
    }

    /// Notes how far a promotion is, durably. Blocks on the disk.
    ///
    /// # Errors
    /// If it is another one, or goes back.
    pub fn promote_step(&self, history: [u8; 16], stage: PromoteStage) -> Result<Frame, Refusal> {
        {
            let state = self.state();
            let known = state.history().map(|row| &row.history).filter(|known| known.history == history);
            match known {
                Some(known) if known.stage <= stage => {}
                _ => {
                    let why = format!("group {:?} was promoted again meanwhile: this one is void", self.name);
                    return Err(Refusal::Bad(why));
                }
            }
        }
        let change = |last: &mut History| {
            if last.history == history {
                last.stage = last.stage.max(stage);
            }
        };
        let row = self.index.change_history(&self.name, change).map_err(|e| Refusal::Store(e.to_string()))?;
        let mut state = self.state();
        state.know(&row);
        match state.history().map(|row| row.history.clone()) {
            Some(known) if known.history == history => Ok(promoted(&state, known)),
            _ => Err(Refusal::Bad(format!("group {:?} was promoted again meanwhile", self.name))),
        }
    }

    /// Whether this is the primary of the group. Blocks on the disk.
    ///
    /// # Errors
    /// The refusal for its agent; that one came that is fenced is noted.
    pub fn admit_writer(&self, id: GroupId) -> Result<(), Refusal> {
        self.settle()?;
        let (admitted, noted) = {
            let state = self.state();
            let noted = state.history().and_then(|row| row.history.refused_ns);
            (state.admit_writer(&self.name, self.id, id), noted)
        };
        let now = wall_ns();
        if let Err(Refusal::Promoted { .. }) = &admitted
            && noted.is_none_or(|then| now.saturating_sub(then) > NOTE_EVERY_NS)
        {
            match self.index.change_history(&self.name, |last| last.refused_ns = Some(now)) {
                Ok(row) => self.state().know(&row),
                // It is refused all the same; that it came is for people.
                Err(error) => tracing::warn!("group {}: {error}", self.name),
            }
        }
        admitted
    }

    /// Where the roots of the applied tree stand. Blocks on the disk.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn places(&self) -> Result<Vec<(ObjectId, PathBytes)>, BackupError> {
        let row = locked(&self.tree).clone();
        let place = |(root, object): &(PathBytes, ObjectId)| {
            Ok((*object, PathBytes::new(&self.area.root_path(root.as_path())?)))
        };
        row.roots.iter().map(place).collect()
    }
}

impl State {
    /// Takes in what the index has.
    fn know(&mut self, row: &GroupRow) {
        self.granted = self.granted.max(row.granted);
        if row.histories.len() >= self.histories.len() {
            self.histories.clone_from(&row.histories);
        }
    }
}

/// Does what waits for the disk in a thread of its own.
#[cfg(not(test))]
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Refusal::Store(e.to_string()))
}

/// Does it here: the simulation's disks are those of its thread.
#[cfg(test)]
pub(super) async fn blocking<T>(work: impl FnOnce() -> T) -> Result<T, Refusal> {
    std::future::ready(Ok(work())).await
}

fn promoted(state: &State, history: History) -> Frame {
    Frame::Promoted { history, pending_records: state.pending.records, pending_bytes: state.pending.bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::gate::Gate;
    use crate::backup::kinds::Kinds;
    use bfs_common::wire::Position;

    const NAME: &str = "g";
    const A: GroupId = GroupId([1; 16]);
    const B: GroupId = GroupId([2; 16]);
    const C: GroupId = GroupId([3; 16]);

    fn state_with(histories: Vec<HistoryRow>) -> State {
        let none = CheckpointId(0);
        let gate = Gate::new(Position::START, none, ObjectId(0), Vec::new(), [0; 16], Kinds::default());
        State::new(gate, Epoch(0), (none, Default::default()), histories)
    }

    fn row(number: u8, at: u64, writer: GroupId, host: &str, stage: PromoteStage) -> HistoryRow {
        let by = Promoter { writer, host: host.into(), to: PathBytes::new("/".as_ref()) };
        let history = History {
            history: [number; 16],
            parent: [number - 1; 16],
            at: CheckpointId(at),
            since_ns: i64::from(number),
            by,
            stage,
            refused_ns: None,
        };
        HistoryRow { history, epoch: Epoch(u64::from(number) * 10) }
    }

    #[test]
    fn only_the_last_that_was_promoted_may_write_and_the_others_hear_where_they_were_fenced() {
        let done = PromoteStage::Done;
        let state = state_with(Vec::new());
        assert_eq!(state.admit_writer(NAME, A, A), Ok(()));
        assert_eq!(state.admit_writer(NAME, A, B), Err(Refusal::OtherGroup { name: NAME.into() }));
        assert_eq!(state.adopts(), None);

        let state = state_with(vec![row(1, 7, B, "b", done)]);
        let promoted = |at, since_ns, host: &str| {
            Err(Refusal::Promoted { at: CheckpointId(at), since_ns, host: host.into() })
        };
        assert_eq!(state.admit_writer(NAME, A, A), promoted(7, 1, "b"));
        assert_eq!(state.admit_writer(NAME, A, B), Ok(()));
        assert!(matches!(state.admit_writer(NAME, A, C), Err(Refusal::OtherGroup { .. })));
        assert_eq!(Err(state.fenced(Epoch(9))), promoted(7, 1, "b"));
        assert_eq!(state.fenced(Epoch(10)), Refusal::Fenced { newest: Epoch(0) });

        // A has the first seven in common with all; B those up to 9, where it went back to A.
        let both = [row(1, 7, B, "b", done), row(2, 9, A, "a", done)];
        let state = state_with(both.to_vec());
        assert_eq!(state.admit_writer(NAME, A, A), Ok(()));
        assert_eq!(state.admit_writer(NAME, A, B), promoted(9, 2, "a"));
        let state = state_with([&both[..], &[row(3, 12, C, "c", done)]].concat());
        assert_eq!(state.admit_writer(NAME, A, A), promoted(12, 3, "c"));
        assert_eq!(state.admit_writer(NAME, A, B), promoted(9, 2, "c"));
    }

    #[test]
    fn nobody_writes_before_a_promotion_is_finished() {
        for stage in [PromoteStage::Fenced, PromoteStage::Placing] {
            let state = state_with(vec![row(1, 7, B, "b", stage)]);
            assert!(matches!(state.admit_writer(NAME, A, B), Err(Refusal::Store(_))), "{stage:?}");
        }
    }

    #[test]
    fn a_tree_is_adopted_until_a_checkpoint_of_the_new_primary_is_applied() {
        let mut state = state_with(vec![row(1, 7, B, "b", PromoteStage::Done)]);
        state.applied.0 = CheckpointId(7);
        assert_eq!(state.adopts(), Some(PathBytes::new("/".as_ref())));
        state.applied.0 = CheckpointId(8);
        assert_eq!(state.adopts(), None);
    }
}
