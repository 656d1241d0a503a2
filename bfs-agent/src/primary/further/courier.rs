//! Brings checkpoints to one further destination, one after the other.

use std::io;
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, GroupId};
use bfs_common::wire::{GenerationLine, Refusal};

use super::steps::{Mark, StepError};
use super::{Place, Shared, View};
use crate::generation::next::{Apart, Step, carry, kept, next, pour};
use crate::generation::{Client, OpenError, ReadError};
use crate::net::{AskError, ConnectError};
use crate::primary::control::Standing;
use crate::primary::ship::Sends;

/// How often a destination is asked how it stands, when there is nothing for it.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How soon it is asked again whether it has applied what it has: before, it takes no more.
const APPLIED_EVERY: Duration = Duration::from_millis(20);
/// Between two tries, at first; then twice as long each time.
const AGAIN_MIN: Duration = Duration::from_millis(250);
/// The longest of these.
const AGAIN_MAX: Duration = Duration::from_secs(15);

/// Why a destination gets nothing now.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    /// It cannot be reached, or does not take it. This may pass.
    #[error("{0}")]
    Away(String),
    /// What it has is not what this group had.
    #[error("{0}")]
    Apart(String),
    /// Nothing is to be sent any more.
    #[error("nothing is to be sent there any more")]
    Ended,
    /// What was kept for it.
    #[error(transparent)]
    Step(#[from] StepError),
}

impl From<OpenError> for Trouble {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Connect(ConnectError::Refused { refusal, .. }) => Self::from(refusal),
            error => Self::Away(error.to_string()),
        }
    }
}

impl From<ReadError> for Trouble {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Ask(AskError::Refused(refusal)) => Self::from(refusal),
            ReadError::Sink(error) if error.kind() == io::ErrorKind::Interrupted => Self::Ended,
            error => Self::Away(error.to_string()),
        }
    }
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Promoted { .. } | Refusal::OtherGroup { .. } => Self::Apart(refusal.to_string()),
            refusal => Self::Away(refusal.to_string()),
        }
    }
}

impl From<Apart> for Trouble {
    fn from(apart: Apart) -> Self {
        Self::Apart(apart.to_string())
    }
}

/// What a destination gets next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nothing: it has the newest.
    Here,
    /// What lies between these two of the kept ones.
    Step(usize, usize),
    /// The kept ones do not go back so far.
    Elsewhere,
}

/// Decides by the newest checkpoint there and the kept ones.
pub(crate) fn way(newest: Option<&GenerationLine>, marks: &[Mark]) -> Result<Way, Apart> {
    let (Some(newest), Some(last)) = (newest, marks.len().checked_sub(1)) else { return Ok(Way::Elsewhere) };
    let Some(at) = marks.iter().position(|mark| mark.moment.checkpoint == newest.checkpoint) else {
        return Ok(Way::Elsewhere);
    };
    if marks[at].moment.label != newest.label {
        return Err(Apart::Another(newest.checkpoint));
    }
    Ok(if at == last { Way::Here } else { Way::Step(at, last) })
}

/// Decides what another destination can give, by what both keep. Only of the first one it matters that it can give
/// nothing: each of the others stands somewhere, too. And what the first one does not have yet stands in the spool, or waits
/// to be applied.
pub(crate) fn from_another(
    ours: &[GenerationLine],
    theirs: &[GenerationLine],
    is_first: bool,
) -> Result<Step, Apart> {
    match next(ours, theirs) {
        Ok(Step::Done(_)) | Err(_) if !is_first => Ok(Step::Wait),
        Err(Apart::Behind { .. }) => Ok(Step::Wait),
        decided => decided,
    }
}

/// What is to be done after a round.
enum Then {
    /// The next one.
    GoOn,
    /// Wait for something new, no longer than this.
    Wait(Duration),
}

struct Courier<'a> {
    shared: &'a Shared,
    id: u64,
    place: &'a Place,
    client: Option<Client>,
    /// The newest checkpoint there, once it is known.
    newest: Option<GenerationLine>,
    connections: u64,
}

/// Until the destination is none any more.
pub(super) fn run(shared: &Shared, id: u64, place: &Place) {
    let mut courier = Courier { shared, id, place, client: None, newest: None, connections: 0 };
    let mut again = AGAIN_MIN;
    loop {
        let seen = shared.lock().version;
        let then = match shared.leg(id, |leg| leg.paused) {
            None => return,
            Some(true) => {
                courier.hang_up(Standing::Detached, "paused: `bfs-agent dest resume` goes on".into());
                Ok(Then::Wait(LOOK_EVERY))
            }
            Some(false) => courier.round(),
        };
        match then {
            Ok(Then::GoOn) => again = AGAIN_MIN,
            Ok(Then::Wait(time)) => {
                again = AGAIN_MIN;
                courier.wait(time, |state_version| state_version != seen);
            }
            Err(Trouble::Ended) => courier.hang_up(Standing::Detached, String::new()),
            Err(trouble) => {
                let standing = if matches!(trouble, Trouble::Apart(_)) {
                    Standing::Diverged
                } else {
                    Standing::Detached
                };
                courier.hang_up(standing, trouble.to_string());
                courier.wait(again, |_| false);
                again = (again * 2).min(AGAIN_MAX);
            }
        }
    }
}

impl Courier<'_> {
    fn leg(&self, change: impl FnOnce(&mut super::Leg)) {
        // Without one the next round ends it.
        let _ = self.shared.leg(self.id, change);
    }

    fn hang_up(&mut self, standing: Standing, why: String) {
        (self.client, self.newest) = (None, None);
        self.leg(|leg| {
            leg.connected = false;
            leg.stands(standing, Some(why));
        });
    }

    /// Until the time has passed, something is new that matters, or the destination is none any more (or paused).
    fn wait(&self, time: Duration, is_new: impl Fn(u64) -> bool) {
        let deadline = Instant::now() + time;
        let mut state = self.shared.lock();
        let was_paused = state.legs.iter().any(|leg| leg.0 == self.id && leg.2.paused);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mine = state.legs.iter().find(|leg| leg.0 == self.id);
            let ended = state.ended || mine.is_none_or(|leg| leg.2.paused != was_paused);
            if left.is_zero() || ended || is_new(state.version) {
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// Looks once, and brings what there is.
    fn round(&mut self) -> Result<Then, Trouble> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => {
                let mut client = Client::open((self.place.connect)())?;
                self.newest = kept(&mut client, &self.shared.options.group)?.pop();
                let reconnects = self.connections;
                self.connections += 1;
                self.leg(|leg| leg.reconnects = reconnects);
                client
            }
        };
        let then = self.go_on(&mut client)?;
        self.client = Some(client);
        Ok(then)
    }

    fn go_on(&mut self, client: &mut Client) -> Result<Then, Trouble> {
        let group = &self.shared.options.group;
        let status = client.status()?.into_iter().find(|status| status.group == *group);
        let newest = self.newest.as_ref().map_or(CheckpointId(0), |line| line.checkpoint);
        let applied = status.as_ref().map_or(CheckpointId(0), |status| status.applied);
        self.leg(|leg| {
            leg.connected = true;
            (leg.confirmed, leg.applied) = (newest, applied);
            if let Some(status) = &status {
                leg.store = status.state;
            }
        });
        let view = self.shared.lock().sealed_view();
        let way = way(self.newest.as_ref(), view.as_ref().map_or(&[], |view| &view.marks))?;
        if way != Way::Here && applied < newest {
            // It takes no more before.
            if let Some(trouble) = status.and_then(|status| status.trouble) {
                self.leg(|leg| leg.stands(Standing::Lagging, Some(trouble)));
            }
            self.wait(APPLIED_EVERY, |_| false);
            return Ok(Then::GoOn);
        }
        match (way, view) {
            (Way::Step(from, to), Some(view)) => {
                self.attached();
                let newest = view.marks[to].moment.line();
                let id = status.map(|status| status.id).unwrap_or_default();
                self.step(client, id, &view, (from, to))?;
                self.has(newest);
                Ok(Then::GoOn)
            }
            (Way::Elsewhere, _) => self.take_from_another(client),
            _ => {
                self.attached();
                let time = if applied < newest { APPLIED_EVERY } else { LOOK_EVERY };
                Ok(Then::Wait(time))
            }
        }
    }

    fn attached(&self) {
        self.leg(|leg| leg.stands(Standing::Attached, None));
    }

    fn has(&mut self, newest: GenerationLine) {
        let checkpoint = newest.checkpoint;
        self.newest = Some(newest);
        // The session may wait for that.
        self.shared.changes(|state| {
            if let Some(leg) = state.legs.iter_mut().find(|leg| leg.0 == self.id) {
                leg.2.confirmed = checkpoint;
            }
        });
    }

    /// Brings what lies between two kept checkpoints.
    fn step(
        &self,
        client: &mut Client,
        id: GroupId,
        view: &View,
        step: (usize, usize),
    ) -> Result<(), Trouble> {
        let group = &self.shared.options.group;
        pour(client, group, &mut |bytes| self.may_send(bytes), |sink| {
            Ok(view.stream((group, id), step, sink)?)
        })
    }

    /// Brings the newest checkpoint of another destination.
    fn take_from_another(&mut self, client: &mut Client) -> Result<Then, Trouble> {
        let group = self.shared.options.group.clone();
        let ours: Vec<_> = self.newest.clone().into_iter().collect();
        let (mut apart, mut away) = (None, None);
        for (at, place) in self.others().into_iter().enumerate() {
            let theirs = || -> Result<_, Trouble> {
                let mut there = Client::open((place.connect)())?;
                let theirs = kept(&mut there, &group)?;
                Ok((there, theirs))
            };
            let (mut there, theirs) = match theirs() {
                Ok(found) => found,
                Err(trouble) => {
                    away = Some(format!("{}: {trouble}", place.address));
                    continue;
                }
            };
            match from_another(&ours, &theirs, at == 0) {
                Ok(Step::Wait) => {}
                // It has what there is; what the primary makes next comes by the same way.
                Ok(Step::Done(_)) => {
                    self.attached();
                    return Ok(Then::Wait(LOOK_EVERY));
                }
                Ok(Step::Take { older, newest }) => {
                    let how = older
                        .map_or_else(|| "all of it".to_owned(), |older| format!("what differs from {older}"));
                    let why = format!("checkpoint {newest} comes from {}, {how}", place.address);
                    self.leg(|leg| leg.stands(Standing::Lagging, Some(why)));
                    carry(&mut there, client, &group, (older, newest), &mut |bytes| self.may_send(bytes))?;
                    if let Some(line) = theirs.into_iter().find(|line| line.checkpoint == newest) {
                        self.has(line);
                    }
                    return Ok(Then::GoOn);
                }
                Err(error) => apart = Some(error),
            }
        }
        if let Some(apart) = apart {
            return Err(apart.into());
        }
        let why = away.unwrap_or_else(|| {
            "no other destination has applied a checkpoint yet that goes on from what is there".into()
        });
        self.leg(|leg| leg.stands(Standing::Lagging, Some(why)));
        Ok(Then::Wait(LOOK_EVERY))
    }

    /// The first destination, then the others that are there.
    fn others(&self) -> Vec<Place> {
        let state = self.shared.lock();
        let others = state.legs.iter().filter(|(id, _, leg)| *id != self.id && leg.connected);
        let others = others.map(|(_, place, _)| place.clone());
        [self.shared.options.first.clone()].into_iter().chain(others).collect()
    }

    /// Waits for the limit of the user, if there is one, and counts what goes.
    fn may_send(&self, bytes: usize) -> io::Result<()> {
        let ended = || io::Error::from(io::ErrorKind::Interrupted);
        loop {
            if self.shared.leg(self.id, |leg| leg.paused).unwrap_or(true) {
                return Err(ended());
            }
            let Some(Err(at)) = self.place.limit.as_ref().map(|limit| limit.may(Sends::Records)) else {
                break;
            };
            self.wait(at.saturating_duration_since(Instant::now()), |_| false);
        }
        if let Some(limit) = &self.place.limit {
            limit.sent(Sends::Records, bytes);
        }
        self.shared.leg(self.id, |leg| leg.sent_bytes += bytes as u64).ok_or_else(ended)
    }
}

#[cfg(test)]
mod tests {
    use bfs_common::record::{CheckpointLabel, Sequence};

    use super::*;
    use crate::transfer::Moment;

    fn label(wall_ns: i64) -> CheckpointLabel {
        CheckpointLabel { wall_ns, ..CheckpointLabel::default() }
    }

    fn marks(numbers: &[u64]) -> Vec<Mark> {
        let moment =
            |n: u64| Moment { checkpoint: CheckpointId(n), label: label(n as i64), roots: Vec::new() };
        numbers.iter().map(|n| Mark { moment: moment(*n), sequence: Sequence(*n), end: *n }).collect()
    }

    fn line(number: u64, wall_ns: i64) -> GenerationLine {
        GenerationLine {
            checkpoint: CheckpointId(number),
            label: label(wall_ns),
            changed: 0,
            bytes: 0,
            process: None,
        }
    }

    #[test]
    fn whether_there_is_a_way_only_the_first_says() {
        let n = CheckpointId;
        let step = || Ok(Step::Take { older: Some(n(2)), newest: n(4) });
        let theirs = [line(2, 2), line(4, 4)];
        for is_first in [false, true] {
            assert_eq!(from_another(&[line(2, 2)], &theirs, is_first), step());
            // The first one has it in its log, or gets it out of the spool.
            assert_eq!(from_another(&[line(7, 7)], &theirs, is_first), Ok(Step::Wait));
            assert_eq!(from_another(&[line(7, 7)], &[], is_first), Ok(Step::Wait));
        }
        for (ours, decided) in [
            (line(4, 4), Ok(Step::Done(n(4)))),
            (line(3, 3), Err(Apart::Merged(n(3)))),
            (line(2, 9), Err(Apart::Another(n(2)))),
        ] {
            assert_eq!(from_another(std::slice::from_ref(&ours), &theirs, false), Ok(Step::Wait));
            assert_eq!(from_another(&[ours], &theirs, true), decided);
        }
    }

    #[test]
    fn the_way_is_a_step_where_the_kept_records_go_back_so_far() {
        assert_eq!(way(None, &marks(&[1, 2])), Ok(Way::Elsewhere));
        assert_eq!(way(Some(&line(1, 1)), &[]), Ok(Way::Elsewhere));
        assert_eq!(way(Some(&line(1, 1)), &marks(&[2, 3])), Ok(Way::Elsewhere));
        assert_eq!(way(Some(&line(2, 2)), &marks(&[2, 3, 7])), Ok(Way::Step(0, 2)));
        assert_eq!(way(Some(&line(7, 7)), &marks(&[2, 3, 7])), Ok(Way::Here));
        // The number of another history.
        assert_eq!(way(Some(&line(3, 9)), &marks(&[2, 3, 7])), Err(Apart::Another(CheckpointId(3))));
    }
}
