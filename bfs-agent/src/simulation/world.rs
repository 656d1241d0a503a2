//! The hosts, what happens between them, and what must hold: what is given out is always a confirmed checkpoint,
//! what was acknowledged is always there, and in the end the backup is the primary. Where another host is promoted:
//! nothing that was acknowledged is lost with that, and nothing comes of who was fenced.

mod further;
mod promoting;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::record::*;
use bfs_common::wire::{History, Position, Refusal};
use bfs_tests::random::Random;
use bytes::Bytes;

use super::agent::Agent;
use super::disk::{self, Failure};
use super::primary::Primary;
use super::stream::Stream;
use crate::backup::group::simulated::Simulated;
use crate::backup::model::{May, Model, TOP};
use crate::backup::retention::Retention;
use crate::log::segment::SegmentReader;
use crate::log::segments;
use further::Further;

/// The backup's disk: the applier works on the first one.
pub const BACKUP: usize = 0;
/// Those that have the program, one at a time; each with its disk.
const NAMES: [&str; 2] = ["primary", "second"];
/// Turns until nothing fails any more.
const TURNS: usize = 500;
/// By then all must be even.
const TURNS_MAX: usize = 20_000;

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
    /// Whose agent it is of.
    host: usize,
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
    /// Starts of a replayer whose log had been writing over a file that was a segment before.
    pub renewed: u64,
    pub failed_calls: u64,
    pub agents: u64,
    pub spooled: u64,
    pub applied: u64,
    pub refused_markers: u64,
    pub promotions: u64,
    /// That were said to have failed, and stand all the same.
    pub late_promotions: u64,
    /// That came all the same, and were refused.
    pub fenced: u64,
    /// Streams for further destinations: out of the kept records, and from another destination.
    pub steps: u64,
    pub carried: u64,
    /// Further destinations that had to begin with an empty store.
    pub begun_again: u64,
    /// Checkpoints that they gave out.
    pub applied_further: u64,
}

/// What there is beside a primary, its destination and the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside {
    /// Another host, and they are promoted.
    pub promotes: bool,
    /// Further destinations.
    pub further: bool,
}

/// A host with the program.
struct Host {
    primary: Primary,
    agent: Option<Agent>,
}

/// Who writes the group from this host.
fn writer(host: usize) -> GroupId {
    GroupId([1 + host as u8; 16])
}

fn disk_of(host: usize) -> usize {
    1 + host
}

/// See the module.
pub struct World {
    random: Random,
    folder: PathBuf,
    hosts: Vec<Host>,
    /// The one that is the primary.
    writer: usize,
    /// The one whose turn it is.
    at: usize,
    /// Others are promoted.
    promotes: bool,
    further: Vec<Further>,
    /// What the primary was, by the number and the time of a checkpoint; where there are further destinations.
    states: BTreeMap<(CheckpointId, i64), Model>,
    /// A promotion that is not finished.
    promoted: Option<History>,
    /// That was to be noted; where it failed it may stand all the same.
    finishing: bool,
    /// One was asked for, of this host, and that failed; it may have begun all the same.
    asked: Option<usize>,
    /// The newest one that is known.
    newest: Option<[u8; 16]>,
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
    pub fn new(seed: u64, folder: PathBuf, beside: Beside) -> Self {
        let mut random = Random::new(seed);
        for (disk, name) in ["backup"].into_iter().chain(NAMES).enumerate() {
            std::fs::create_dir(folder.join(name)).unwrap();
            let seed = if disk <= 1 { random.next() } else { seed };
            assert_eq!(disk::install(&folder.join(name), seed), disk);
        }
        let retention = Retention::last(2 + random.below(4) as u32, 1);
        let count = if beside.further { 1 + random.below(2) } else { 0 };
        let further = (0..count).map(|at| Further::new(folder.join(format!("further{at}")), random.next()));
        let further = further.collect();
        Self {
            random,
            folder,
            hosts: vec![Host { primary: Primary::new(1), agent: None }],
            writer: 0,
            at: 0,
            promotes: beside.promotes,
            further,
            states: BTreeMap::new(),
            promoted: None,
            finishing: false,
            asked: None,
            newest: None,
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
        for _ in 0..TURNS {
            self.turn();
        }
        self.come_to_rest();
        self.check_given_out(true);
        (0..self.further.len()).for_each(|of| self.check_further(of, true));
    }

    /// Nothing fails any more, until the backup has everything.
    fn come_to_rest(&mut self) {
        self.calm = true;
        disk::calm();
        for _ in 0..TURNS_MAX {
            if self.is_even() {
                return;
            }
            self.turn();
        }
        panic!("it does not come to rest: {}", self.stands());
    }

    /// The backup is the primary, and both know.
    fn is_even(&self) -> bool {
        let Host { primary, agent } = &self.hosts[self.writer];
        let (Some(agent), Some(replayer)) = (agent, &self.replayer) else { return false };
        let last = primary.stream.checkpoint();
        agent.is_even(primary)
            && !agent.has_gaps()
            && last > CheckpointId(0)
            && primary.stream.confirmed(primary.stream.end()) == last
            && replayer.progress().applied == last
            && primary.stream.state(last).is_some_and(|then| then.is(&primary.model))
            && self.further.iter().all(|further| further.is_at(last))
    }

    /// For the message of a run that goes wrong.
    fn stands(&self) -> String {
        let Host { primary, agent } = &self.hosts[self.writer];
        let agent = agent.as_ref().map(|agent| {
            let (queue, even) = (&agent.queue, agent.is_even(primary));
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
        let stream = (primary.stream.end(), primary.stream.checkpoint());
        let further: Vec<_> = self.further.iter().map(Further::stands).collect();
        let (host, promoted) = (self.writer, &self.promoted);
        format!("host {host}, stream {stream:?}, {agent:?}, {replayer:?}, {promoted:?}, {further:?}")
    }

    fn turn(&mut self) {
        self.settle_promotion();
        self.at = self.writer;
        if self.promotes && !self.calm {
            self.promotion();
            if self.hosts.len() > 1 && self.random.chance(25) {
                self.at = 1 - self.writer;
            }
        } else {
            self.finish_promotion();
        }
        self.start_hosts();
        if !self.further.is_empty() && self.random.chance(30) {
            return self.further_turn();
        }
        match self.random.below(100) {
            0..16 if !self.calm => {
                let op = self.random.next().to_le_bytes();
                self.hosts[self.at].primary.does((op[0], op[1], op[2], op[3]));
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
    fn start_hosts(&mut self) {
        if disk::has_failed(BACKUP) {
            self.replayer = None;
            self.connections.iter_mut().for_each(|connection| connection.replayer = false);
            self.count(disk::start(BACKUP));
        }
        for at in 0..self.hosts.len() {
            if !disk::has_failed(disk_of(at)) {
                continue;
            }
            self.agent_dies(at);
            let how = disk::start(disk_of(at));
            self.count(how);
            if how == Some(Failure::Power) {
                let primary = &mut self.hosts[at].primary;
                primary.boot = primary.boot.wrapping_add(1);
                primary.ring.clear();
                primary.loses();
            }
        }
        if self.replayer.is_none() && (self.calm || self.random.chance(10)) {
            let refused = disk::refused(BACKUP);
            self.seen.renewed += u64::from(self.log_is_renewed());
            match Simulated::open(&self.folder.join("backup"), writer(0), self.retention.clone()) {
                Ok(replayer) => {
                    self.replayer = Some(replayer);
                    self.check_kept();
                }
                Err(_) if disk::has_failed(BACKUP) || disk::refused(BACKUP) > refused => {}
                Err(error) => panic!("the store cannot be opened: {error}"),
            }
        }
        if self.hosts[self.at].agent.is_none() && (self.calm || self.random.chance(10)) {
            let bytes_max = if self.calm { 1 << 20 } else { *self.random.of(&[3000, 20_000, 1 << 20]) };
            // A clock that jumped makes what is in the spool older than it may get.
            let jumped = !self.calm && self.random.chance(10);
            let time_max = Duration::from_secs(if jumped { 0 } else { 3600 });
            let folder = self.folder.join(NAMES[self.at]);
            let host = &mut self.hosts[self.at];
            let who = (writer(self.at), disk_of(self.at));
            let folder = (&*folder, self.further.len());
            host.agent = Agent::start(who, folder, host.primary.boot, bytes_max, time_max);
            self.seen.agents += u64::from(host.agent.is_some());
        }
    }

    fn count(&mut self, how: Option<Failure>) {
        match how {
            Some(Failure::Power) => self.seen.power_cuts += 1,
            Some(_) => self.seen.kills += 1,
            None => {}
        }
    }

    fn agent_dies(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if let Some(agent) = host.agent.take() {
            // The next one finds what nobody has durably.
            host.primary.told = None;
            self.close(agent.connection);
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
        let Host { primary, agent: Some(agent) } = &mut self.hosts[self.at] else { return };
        agent.push();
        for _ in 0..1 + self.random.below(6) {
            agent.consume(primary, by_reference);
        }
    }

    fn checkpoint(&mut self) {
        let wrong = !self.calm && self.random.chance(10);
        // Wall clocks jump, in both directions.
        let host = &mut self.hosts[self.at];
        host.primary.wall_ns = self.random.next() as i64 >> 2;
        let Some(agent) = &mut host.agent else { return };
        // One that is wrong must be told at once: it is not for the spool.
        let told = self.further.is_empty() && agent.is_welcome && agent.queue.in_spool().0 == 0;
        let wrong = wrong && agent.has_gaps() && told;
        let before = host.primary.stream.end();
        agent.checkpoint(&mut host.primary, !wrong);
        let Primary { stream, wall_ns, .. } = &host.primary;
        if !self.further.is_empty() && stream.end() > before {
            let checkpoint = stream.checkpoint();
            let state = stream.state(checkpoint).expect("the last one").clone();
            self.states.insert((checkpoint, *wall_ns), state);
        }
    }

    fn send(&mut self) {
        let Some(agent) = self.hosts[self.at].agent.as_mut().filter(|agent| agent.is_welcome) else { return };
        let Some(connection) = self.connections.iter_mut().find(|c| Some(c.number) == agent.connection)
        else {
            return;
        };
        if let Some(frame) = agent.send() {
            connection.up.push_back(frame);
        }
    }

    fn keep(&mut self) {
        let Some(agent) = &mut self.hosts[self.at].agent else { return };
        let takes = agent.connection.is_none() || self.random.chance(30);
        let kept = agent.keep(takes);
        let disk = disk_of(self.at);
        assert!(kept || disk::has_failed(disk) || disk::refused(disk) > 0, "the spool");
        self.seen.spooled += agent.queue.in_spool().0;
    }

    fn connect(&mut self) {
        let (Some(agent), Some(_)) = (&mut self.hosts[self.at].agent, &self.replayer) else { return };
        if agent.connection.is_some() {
            return;
        }
        self.number += 1;
        agent.connection = Some(self.number);
        agent.is_welcome = false;
        self.connections.push(Connection {
            number: self.number,
            host: self.at,
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
            Some(Up::Hello(epoch)) => match replayer.hello(connection.number, writer(connection.host), epoch)
            {
                Ok(epoch) => {
                    assert!(
                        connection.host == self.writer && (self.promoted.is_none() || self.finishing),
                        "host {} is let in, but {} was promoted",
                        connection.host,
                        self.writer
                    );
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
        let Host { primary, agent: Some(agent) } = &mut self.hosts[self.at] else { return };
        let Some(connection) = self.connections.iter_mut().find(|c| Some(c.number) == agent.connection)
        else {
            return;
        };
        let done = match connection.down.pop_front() {
            Some(Down::Welcome { epoch, position, gaps }) => {
                let known = primary.stream.chain(position.sequence);
                assert_eq!(known, Some(position.chain), "the replayer has {position:?}, which is not ours");
                agent.welcomed(primary, epoch, position, &gaps)
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
                self.starts_anew();
            }
            // A frame was lost on the way.
            Refusal::Gap { .. } => self.agent_dies(self.at),
            // Another host is the primary, or was meanwhile: what was not sent by then is void.
            Refusal::Promoted { .. } | Refusal::Fenced { .. } if self.seen.promotions > 0 => {
                self.seen.fenced += 1;
                self.starts_anew();
            }
            Refusal::Busy { .. } if self.seen.promotions > 0 => {}
            other => panic!("refused: {other}"),
        }
    }

    /// What the agent has is thrown away; the next one compares everything.
    fn starts_anew(&mut self) {
        let Host { primary, agent } = &mut self.hosts[self.at];
        if let Some(agent) = agent {
            agent.throw_away();
        }
        primary.sealed = Sequence(0);
        primary.loses();
        self.agent_dies(self.at);
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
        let confirmed = self.stream().confirmed(now.0.sequence);
        assert!(now.1 <= confirmed && now.2 <= now.1, "{now:?}, but the last marker is of {confirmed}");
        self.acknowledged = now;
    }

    /// The network loses, doubles, swaps and breaks.
    fn disturb(&mut self) {
        let Some(agent) = &mut self.hosts[self.at].agent else { return };
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
            5..7 => disk::fail_at(disk_of(self.at), self.random.below(8) as u64, how),
            7 => disk::fail_now(disk_of(self.at), if how == Failure::Once { Failure::Kill } else { how }),
            _ => {}
        }
    }

    /// What the agent may count on, and the ring is released for.
    fn note(&mut self) {
        let Host { primary, agent } = &mut self.hosts[self.at];
        let Some(agent) = agent.as_mut().filter(|agent| agent.is_live()) else { return };
        agent.first_applied = self.acknowledged.2;
        primary.sealed = primary.sealed.max(agent.queue.sealed());
        if let Some(released) = agent.queue.released() {
            primary.released(released);
        }
    }

    /// The stream that counts.
    fn stream(&self) -> &Stream {
        &self.hosts[self.writer].primary.stream
    }

    /// Whether the newest segment of the backup's log is in a file that was one before.
    fn log_is_renewed(&self) -> bool {
        let log = self.folder.join("backup/log/g");
        let newest = segments(&log).ok().and_then(|all| all.last().copied());
        let reader = newest.and_then(|number| SegmentReader::open(&log, number, writer(0)).ok());
        reader.is_some_and(|reader| reader.header.mark.is_some())
    }

    /// After a start of the replayer: what it acknowledged is there.
    fn check_kept(&self) {
        let Some(replayer) = &self.replayer else { return };
        let position = replayer.group.state().gate.position;
        let progress = replayer.progress();
        let (durable, confirmed, applied) = self.acknowledged;
        assert!(position.sequence >= durable.sequence, "{durable:?} was acknowledged, there is {position:?}");
        assert_eq!(self.stream().chain(position.sequence), Some(position.chain), "other records");
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
        assert!(applied <= self.stream().confirmed(durable), "{applied} is not confirmed");
        let stream = &self.hosts[self.writer].primary.stream;
        let state = |of| stream.state(of).unwrap_or_else(|| panic!("{of} is of nobody"));
        if !all {
            kept = vec![*self.random.of(&kept)];
        }
        let kept: Vec<_> = kept.into_iter().map(|of| (of, state(of))).collect();
        compare(replayer, &self.folder.join("backup/tree/g/r"), state(applied), &kept);
    }
}

/// A tree is this state, and generations are these.
fn compare(replayer: &Simulated, tree: &Path, applied: &Model, kept: &[(CheckpointId, &Model)]) {
    applied.compare(TOP, tree);
    for (checkpoint, state) in kept {
        let read = replayer.read(*checkpoint, |past| {
            state.compare_past(past, May::Nothing);
            Ok(())
        });
        read.unwrap_or_else(|error| panic!("generation {checkpoint}: {error}"));
    }
}
