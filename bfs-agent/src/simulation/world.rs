//! Two hosts, what happens between them, and what must hold: what is given out is always a confirmed checkpoint,
//! what was acknowledged is always there, and in the end the backup is the primary.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use bfs_common::record::*;
use bfs_common::wire::{Position, Refusal};
use bfs_tests::random::Random;
use bytes::Bytes;

use super::agent::{Agent, GROUP};
use super::disk::{self, Failure};
use super::stream::{Line, Stream};
use crate::backup::group::simulated::Simulated;
use crate::backup::model::{May, Model, TOP};
use crate::backup::retention::Retention;

/// The backup's disk: the applier works on the first one.
pub const BACKUP: usize = 0;
/// The primary's.
pub const PRIMARY: usize = 1;
/// Operations that the ring holds.
const RING: usize = 60;
/// Turns until nothing fails any more.
const TURNS: usize = 500;
/// By then all must be even.
const TURNS_MAX: usize = 20_000;

/// A call of the program, in the ring until what it did is durable.
pub struct Op {
    pub number: u64,
    pub lines: Vec<Line>,
}

/// What the primary is beside its agent, which may go.
pub struct Primary {
    pub model: Model,
    pub ring: VecDeque<Op>,
    pub stream: Stream,
    /// The last record that was said to be durable, on either side.
    pub sealed: Sequence,
    /// Calls were lost, and nobody knows which.
    lost: bool,
    /// The stream says so with this operation, when that is durable.
    told: Option<u64>,
    pub boot: u8,
    ops: u64,
    wall_ns: i64,
}

impl Primary {
    /// The last operation.
    pub fn last_op(&self) -> u64 {
        self.ops
    }

    /// A label, and nothing else.
    pub fn wall_ns(&self) -> i64 {
        self.wall_ns
    }

    /// Whether the stream does not say of everything durably.
    pub fn has_lost(&self) -> bool {
        self.lost
    }

    /// Whether the next record has to name a loss.
    pub fn must_tell(&self) -> bool {
        self.lost && self.told.is_none()
    }

    /// The next record names it, if there is one that was not named.
    pub fn tells_loss(&mut self) -> bool {
        let tells = self.must_tell();
        if tells {
            self.told = Some(self.ops);
        }
        tells
    }

    fn loses(&mut self) {
        self.lost = true;
        self.told = None;
    }

    fn released(&mut self, up_to: u64) {
        while self.ring.pop_front_if(|op| op.number <= up_to).is_some() {}
        if self.told.is_some_and(|told| told <= up_to) {
            (self.lost, self.told) = (false, None);
        }
    }

    fn does(&mut self, op: (u8, u8, u8, u8)) {
        self.model.do_op(op);
        self.ops += 1;
        let lines = std::mem::take(&mut self.model.records);
        if self.ring.len() >= RING {
            self.loses();
        } else {
            self.ring.push_back(Op { number: self.ops, lines });
        }
    }
}

/// From the agent.
#[derive(Clone)]
pub enum Up {
    Hello(Option<Epoch>),
    Records(Sequence, u32, Bytes),
}

/// From the replayer.
enum Down {
    Welcome { epoch: Epoch, position: Position, gaps: Vec<GapScope> },
    Ack(Position),
    Refused(Refusal),
}

/// Frames on their way. Either end may be closed while the other does not know.
struct Connection {
    number: u64,
    up: VecDeque<Up>,
    down: VecDeque<Down>,
    agent: bool,
    replayer: bool,
    /// The epoch of its Hello, when that was answered, and what was said last.
    said: Option<(Epoch, Position)>,
}

/// What came about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub kills: u64,
    pub power_cuts: u64,
    pub failed_calls: u64,
    pub agents: u64,
    pub spooled: u64,
    pub applied: u64,
    pub refused_markers: u64,
}

/// See the module.
pub struct World {
    random: Random,
    folder: PathBuf,
    primary: Primary,
    agent: Option<Agent>,
    replayer: Option<Simulated>,
    connections: Vec<Connection>,
    number: u64,
    retention: Retention,
    /// The most that was acknowledged: the position, and the last checkpoint that was confirmed and applied.
    acknowledged: (Position, CheckpointId, CheckpointId),
    pub seen: Seen,
    /// Nothing fails any more.
    calm: bool,
    checked: CheckpointId,
}

impl World {
    pub fn new(seed: u64, folder: PathBuf) -> Self {
        let mut random = Random::new(seed);
        for (host, name) in [(BACKUP, "backup"), (PRIMARY, "primary")] {
            std::fs::create_dir(folder.join(name)).unwrap();
            assert_eq!(disk::install(&folder.join(name), random.next()), host);
        }
        let retention = Retention::last(2 + random.below(4) as u32, 1);
        let primary = Primary {
            model: Model::new(),
            ring: VecDeque::new(),
            stream: Stream::default(),
            sealed: Sequence(0),
            // A first agent copies everything.
            lost: true,
            told: None,
            boot: 1,
            ops: 0,
            wall_ns: 0,
        };
        Self {
            random,
            folder,
            primary,
            agent: None,
            replayer: None,
            connections: Vec::new(),
            number: 0,
            retention,
            acknowledged: (Position::START, CheckpointId(0), CheckpointId(0)),
            seen: Seen::default(),
            calm: false,
            checked: CheckpointId(0),
        }
    }

    /// All of it.
    pub fn run(&mut self) {
        self.primary.model.records.clear();
        for _ in 0..TURNS {
            self.turn();
        }
        self.calm = true;
        disk::calm();
        for _ in 0..TURNS_MAX {
            if self.is_even() {
                self.check_given_out(true);
                return;
            }
            self.turn();
        }
        panic!("it does not come to rest: {}", self.stands());
    }

    /// The backup is the primary, and both know.
    fn is_even(&self) -> bool {
        let (Some(agent), Some(replayer)) = (&self.agent, &self.replayer) else { return false };
        let last = self.primary.stream.checkpoint();
        agent.is_even(&self.primary)
            && !agent.has_gaps()
            && last > CheckpointId(0)
            && self.primary.stream.confirmed(self.primary.stream.end()) == last
            && replayer.progress().applied == last
            && self.primary.stream.state(last).is_some_and(|then| then.is(&self.primary.model))
    }

    /// For the message of a run that goes wrong.
    fn stands(&self) -> String {
        let agent = self.agent.as_ref().map(|agent| {
            let (queue, even) = (&agent.queue, agent.is_even(&self.primary));
            let spool = queue.in_spool();
            format!(
                "agent live {} even {even} gaps {} connection {:?} welcome {} durable {} memory {} spool {spool:?}",
                agent.is_live(),
                agent.has_gaps(),
                agent.connection,
                agent.is_welcome,
                queue.durable().sequence,
                queue.bytes(),
            )
        });
        let replayer = self.replayer.as_ref().map(|replayer| (replayer.progress(), replayer.group.status()));
        let stream = (self.primary.stream.end(), self.primary.stream.checkpoint());
        format!("stream {stream:?}, {agent:?}, {replayer:?}")
    }

    fn turn(&mut self) {
        self.hosts();
        match self.random.below(100) {
            0..16 if !self.calm => {
                let op = self.random.next().to_le_bytes();
                self.primary.does((op[0], op[1], op[2], op[3]));
            }
            0..30 => self.consume(),
            30..34 => self.checkpoint(),
            34..46 => self.send(),
            46..53 => self.keep(),
            53..56 => self.connect(),
            56..70 => self.deliver_up(),
            70..80 => self.deliver_down(),
            80..87 => self.log(),
            87..92 => self.apply(),
            92..97 => self.tell(),
            _ if self.calm => {}
            97 => self.disturb(),
            _ => self.fault(),
        }
        self.note();
    }

    /// Hosts that failed are started again, in time.
    fn hosts(&mut self) {
        if disk::has_failed(BACKUP) {
            self.replayer = None;
            self.connections.iter_mut().for_each(|connection| connection.replayer = false);
            self.count(disk::start(BACKUP));
        }
        if disk::has_failed(PRIMARY) {
            self.agent_dies();
            let how = disk::start(PRIMARY);
            self.count(how);
            if how == Some(Failure::Power) {
                self.primary.boot = self.primary.boot.wrapping_add(1);
                self.primary.ring.clear();
                self.primary.loses();
            }
        }
        if self.replayer.is_none() && (self.calm || self.random.chance(10)) {
            let refused = disk::refused(BACKUP);
            match Simulated::open(&self.folder.join("backup"), GROUP, self.retention.clone()) {
                Ok(replayer) => {
                    self.replayer = Some(replayer);
                    self.check_kept();
                }
                Err(_) if disk::has_failed(BACKUP) || disk::refused(BACKUP) > refused => {}
                Err(error) => panic!("the store cannot be opened: {error}"),
            }
        }
        if self.agent.is_none() && (self.calm || self.random.chance(10)) {
            let bytes_max = if self.calm { 1 << 20 } else { *self.random.of(&[3000, 20_000, 1 << 20]) };
            // A clock that jumped makes what is in the spool older than it may get.
            let jumped = !self.calm && self.random.chance(10);
            let time_max = Duration::from_secs(if jumped { 0 } else { 3600 });
            self.agent = Agent::start(&self.folder.join("primary"), self.primary.boot, bytes_max, time_max);
            self.seen.agents += u64::from(self.agent.is_some());
        }
    }

    fn count(&mut self, how: Option<Failure>) {
        match how {
            Some(Failure::Power) => self.seen.power_cuts += 1,
            Some(_) => self.seen.kills += 1,
            None => {}
        }
    }

    fn agent_dies(&mut self) {
        if let Some(agent) = self.agent.take() {
            self.close(agent.connection);
            // The next one finds what nobody has durably.
            self.primary.told = None;
        }
    }

    /// The agent's end of it; what is on its way may come all the same.
    fn close(&mut self, number: Option<u64>) {
        let random = &mut self.random;
        for connection in self.connections.iter_mut().filter(|c| Some(c.number) == number) {
            connection.agent = false;
            connection.down.clear();
            // Who asks for an epoch is not there any more.
            connection.up.retain(|frame| !matches!(frame, Up::Hello(_)));
            let arrive = random.below(connection.up.len() + 1);
            connection.up.truncate(arrive);
        }
    }

    fn consume(&mut self) {
        let by_reference = self.random.chance(30);
        let (Some(agent), primary) = (&mut self.agent, &mut self.primary) else { return };
        agent.push();
        for _ in 0..1 + self.random.below(6) {
            agent.consume(primary, by_reference);
        }
    }

    fn checkpoint(&mut self) {
        let wrong = !self.calm && self.random.chance(10);
        // Wall clocks jump, in both directions.
        self.primary.wall_ns = self.random.next() as i64 >> 2;
        let Some(agent) = &mut self.agent else { return };
        // One that is wrong must be told at once: it is not for the spool.
        let wrong = wrong && agent.has_gaps() && agent.is_welcome && agent.queue.in_spool().0 == 0;
        agent.checkpoint(&mut self.primary, !wrong);
    }

    fn send(&mut self) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.is_welcome) else { return };
        let Some(connection) = self.connections.iter_mut().find(|c| Some(c.number) == agent.connection)
        else {
            return;
        };
        if let Some(frame) = agent.send() {
            connection.up.push_back(frame);
        }
    }

    fn keep(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let takes = agent.connection.is_none() || self.random.chance(30);
        let kept = agent.keep(takes);
        assert!(kept || disk::has_failed(PRIMARY) || disk::refused(PRIMARY) > 0, "the spool");
        self.seen.spooled += agent.queue.in_spool().0;
    }

    fn connect(&mut self) {
        let (Some(agent), Some(_)) = (&mut self.agent, &self.replayer) else { return };
        if agent.connection.is_some() {
            return;
        }
        self.number += 1;
        agent.connection = Some(self.number);
        agent.is_welcome = false;
        self.connections.push(Connection {
            number: self.number,
            up: VecDeque::from([Up::Hello(agent.hello())]),
            down: VecDeque::new(),
            agent: true,
            replayer: true,
            said: None,
        });
    }

    /// The replayer gets a frame, of the agent's connection or of one that is long closed.
    fn deliver_up(&mut self) {
        self.connections.retain(|c| c.agent || (c.replayer && !c.up.is_empty()));
        let waiting: Vec<usize> =
            (0..self.connections.len()).filter(|at| !self.connections[*at].up.is_empty()).collect();
        if waiting.is_empty() {
            return;
        }
        let connection = &mut self.connections[*self.random.of(&waiting)];
        let Some(replayer) = self.replayer.as_mut().filter(|_| connection.replayer) else {
            connection.up.clear();
            return;
        };
        if !replayer.has_room() {
            return;
        }
        let refused = match connection.up.pop_front() {
            Some(Up::Hello(epoch)) => match replayer.hello(connection.number, epoch) {
                Ok(epoch) => {
                    let state = replayer.group.state();
                    let (position, gaps) = (state.gate.position, state.gate.gaps.iter().cloned());
                    connection.said = Some((epoch, position));
                    let mut gaps: Vec<_> = gaps.collect();
                    gaps.sort_by_key(|gap| format!("{gap:?}"));
                    connection.down.push_back(Down::Welcome { epoch, position, gaps });
                    None
                }
                Err(refusal) => Some(refusal),
            },
            Some(Up::Records(first, count, body)) => match connection.said {
                Some((epoch, _)) => replayer.take(connection.number, epoch, first, count, body).err(),
                None => None,
            },
            None => None,
        };
        if let Some(refusal) = refused {
            connection.down.push_back(Down::Refused(refusal));
            connection.replayer = false;
            let mut state = replayer.group.state();
            if state.slot.as_ref().is_some_and(|slot| slot.connection == connection.number) {
                state.slot = None;
            }
        }
    }

    /// The agent gets a frame, or learns that there is none to come.
    fn deliver_down(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let Some(connection) = self.connections.iter_mut().find(|c| Some(c.number) == agent.connection)
        else {
            return;
        };
        let done = match connection.down.pop_front() {
            Some(Down::Welcome { epoch, position, gaps }) => {
                let known = self.primary.stream.chain(position.sequence);
                assert_eq!(known, Some(position.chain), "the replayer has {position:?}, which is not ours");
                agent.welcomed(&mut self.primary, epoch, position, &gaps)
            }
            Some(Down::Ack(position)) => agent.acknowledged(position),
            Some(Down::Refused(refusal)) => Err(refusal),
            None if connection.replayer => Ok(()),
            None => Err(Refusal::Store("the connection is closed".into())),
        };
        let Err(refusal) = done else { return };
        connection.agent = false;
        agent.connection = None;
        agent.is_welcome = false;
        match refusal {
            Refusal::Store(_) => {}
            Refusal::OpenGap { .. } => {
                // What an engine that is wrong made: the next one compares everything.
                self.seen.refused_markers += 1;
                agent.throw_away();
                self.primary.sealed = Sequence(0);
                self.primary.loses();
                self.agent_dies();
            }
            // A frame was lost on the way.
            Refusal::Gap { .. } => self.agent_dies(),
            other => panic!("refused: {other}"),
        }
    }

    fn log(&mut self) {
        if let Some(replayer) = &mut self.replayer {
            replayer.log();
        }
    }

    fn apply(&mut self) {
        let Some(replayer) = &self.replayer else { return };
        let done = replayer.apply();
        if disk::has_failed(BACKUP) {
            return;
        }
        match done {
            Ok(true) => self.check_given_out(false),
            Ok(false) => {}
            Err(_) if disk::refused(BACKUP) > self.seen.failed_calls => {
                self.seen.failed_calls = disk::refused(BACKUP);
            }
            Err(error) => panic!("a step: {error}"),
        }
    }

    /// The replayer says how it stands.
    fn tell(&mut self) {
        let Some(replayer) = &self.replayer else { return };
        let progress = replayer.progress();
        let slot = replayer.group.state().slot.as_ref().map(|slot| slot.connection);
        let Some(connection) = self.connections.iter_mut().find(|c| Some(c.number) == slot) else { return };
        if progress.refuses.is_some() {
            connection.replayer = false;
            return;
        }
        let Some((_, said)) = connection.said.as_mut().filter(|_| connection.replayer) else { return };
        if *said == progress.durable {
            return;
        }
        *said = progress.durable;
        connection.down.push_back(Down::Ack(progress.durable));
        let now = (progress.durable, progress.confirmed, progress.applied);
        assert!(now.0.sequence >= self.acknowledged.0.sequence && now.1 >= self.acknowledged.1);
        let confirmed = self.primary.stream.confirmed(now.0.sequence);
        assert!(now.1 <= confirmed && now.2 <= now.1, "{now:?}, but the last marker is of {confirmed}");
        self.acknowledged = now;
    }

    /// The network loses, doubles, swaps and breaks.
    fn disturb(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let Some(connection) = self.connections.iter_mut().find(|c| Some(c.number) == agent.connection)
        else {
            return;
        };
        let records = |up: &VecDeque<Up>, at: usize| matches!(up.get(at), Some(Up::Records(..)));
        match self.random.below(10) {
            // Something comes behind it, else nobody could know.
            0 if records(&connection.up, 0) && records(&connection.up, 1) => drop(connection.up.pop_front()),
            1 if records(&connection.up, 0) && records(&connection.up, 1) => connection.up.swap(0, 1),
            2..5 if records(&connection.up, 0) => {
                let again = connection.up[0].clone();
                connection.up.insert(self.random.below(connection.up.len()) + 1, again);
            }
            5..10 => {
                let number = agent.connection.take();
                agent.is_welcome = false;
                self.close(number);
            }
            _ => {}
        }
    }

    /// A host fails soon.
    fn fault(&mut self) {
        let how = *self.random.of(&[Failure::Kill, Failure::Power, Failure::Power, Failure::Once]);
        match self.random.below(10) {
            0..4 => disk::fail_at(BACKUP, self.random.below(30) as u64, how),
            4 => disk::fail_now(BACKUP, if how == Failure::Once { Failure::Kill } else { how }),
            5..7 => disk::fail_at(PRIMARY, self.random.below(8) as u64, how),
            7 => disk::fail_now(PRIMARY, if how == Failure::Once { Failure::Kill } else { how }),
            _ => {}
        }
    }

    /// What the agent may count on, and the ring is released for.
    fn note(&mut self) {
        let Some(agent) = self.agent.as_ref().filter(|agent| agent.is_live()) else { return };
        self.primary.sealed = self.primary.sealed.max(agent.queue.sealed());
        if let Some(released) = agent.queue.released() {
            self.primary.released(released);
        }
    }

    /// After a start of the replayer: what it acknowledged is there.
    fn check_kept(&self) {
        let Some(replayer) = &self.replayer else { return };
        let position = replayer.group.state().gate.position;
        let progress = replayer.progress();
        let (durable, confirmed, applied) = self.acknowledged;
        assert!(position.sequence >= durable.sequence, "{durable:?} was acknowledged, there is {position:?}");
        assert_eq!(self.primary.stream.chain(position.sequence), Some(position.chain), "other records");
        assert!(progress.confirmed >= confirmed, "{confirmed} was confirmed, now {}", progress.confirmed);
        assert!(progress.applied >= applied, "{applied} was applied, now it is {}", progress.applied);
    }

    /// The tree, and the generations behind it, when no step is half done.
    fn check_given_out(&mut self, all: bool) {
        let Some(replayer) = self.replayer.as_ref().filter(|replayer| !replayer.is_applying()) else {
            return;
        };
        let (applied, mut kept) = replayer.kept().unwrap();
        if applied == CheckpointId(0) {
            return;
        }
        self.seen.applied += u64::from(applied != self.checked);
        self.checked = applied;
        let durable = replayer.progress().durable.sequence;
        assert!(applied <= self.primary.stream.confirmed(durable), "{applied} is not confirmed");
        let state = |of| self.primary.stream.state(of).unwrap_or_else(|| panic!("{of} is of nobody"));
        state(applied).compare(TOP, &self.folder.join("backup/tree/g/r"));
        if !all {
            kept = vec![*self.random.of(&kept)];
        }
        for checkpoint in kept {
            let read = replayer.read(checkpoint, |past| {
                state(checkpoint).compare_past(past, May::Nothing);
                Ok(())
            });
            read.unwrap_or_else(|error| panic!("generation {checkpoint}: {error}"));
        }
    }
}
