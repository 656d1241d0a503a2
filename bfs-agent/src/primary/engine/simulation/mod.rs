//! The engine against a simulated kernel: tasks make calls whose start, effect and end lie apart,
//! in an order that a seed decides, also while the engine reads. At every checkpoint the state
//! that the stream says must be the one that the effects of exactly the covered calls make.

mod backup;
mod border;
mod fs;
mod handover;
mod memory;
mod requests;
mod runs;
mod world;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bfs_common::record::{ChainHash, CheckpointId, Epoch, FileKind, PathBytes, Record, Sequence};

use super::host::Host;
use super::model::{FileSystems, Model};
use super::outbox::Outbox;
use super::{Engine, Request, Stop};
use crate::policy::{Backup as Class, Policy, Table};
use backup::Backup;
use border::Border;
use fs::{Done, Fs, ROOT};
use handover::{dies, durable};
use world::World;

/// What an agent has of one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    /// Nothing but the backup: what that has already is not sent again.
    Afresh,
    /// The same, and what it knows of inodes is of another host.
    Adopting,
    /// Its ring, from what is durable on.
    GoingOn,
}

/// An agent that begins, and where it does so afresh what stands then.
fn begin(
    world: &mut World,
    border: Border,
    backup: &Backup,
    last: CheckpointId,
    begins: Begins,
) -> (Engine, Fs) {
    let goes_on = begins == Begins::GoingOn;
    if goes_on {
        world.give_back();
    } else {
        world.ring.clear();
        world.stop().unwrap();
        world.ring.clear();
        world.forget_runs();
        world.go();
        world.done.clear();
        world.unreleased.clear();
    }
    world.memory.forgetting.clear();
    world.multiple.values_mut().for_each(|until| *until = world::STAYS);
    let base = world.fs.clone();
    world.base = backup.clone();
    let mut file_systems = FileSystems::default();
    file_systems.add(8, 8, 0);
    let roots = [(PathBytes::new(Path::new("/r")), backup.root)];
    let roots = if backup.next > 0 { &roots[..] } else { &[] };
    let mut model = Model::from_catalog(backup.highest(), file_systems, roots, backup.catalog());
    model.filter = border.filter();
    let mut engine = Engine::new(model, Outbox::new(Sequence(backup.next), ChainHash::START), last);
    if !goes_on {
        engine.compare_blocks(world::BLOCK);
    }
    let root = world.stat_of(ROOT).unwrap();
    engine.begin_epoch(Epoch(last.0 + 1), [0; 16], goes_on, world.now());
    let roots = vec![(PathBuf::from("/r"), root)];
    if begins == Begins::Adopting {
        engine.adopt_roots(Path::new("/"), &roots);
    }
    engine.set_roots(roots);
    if goes_on {
        engine.adopt_multiple(&world.multiple.keys().copied().collect::<Vec<_>>());
        engine.adopt_gaps(&backup.gaps, world.now());
    } else {
        engine.suspect_everything(world.now());
    }
    engine.suspect_events_before(world.now());
    let mapped: BTreeSet<u64> =
        world.memory.maps.keys().chain(world.memory.followed.keys().filter(|_| goes_on)).copied().collect();
    for file in mapped {
        engine.note_mapped(world::inode_id(file), world).unwrap();
    }
    (engine, base)
}

/// What a program leaves alone is not sent again by the next agent.
#[test]
fn what_the_backup_has_is_not_sent_again() {
    for begins in [Begins::Afresh, Begins::Adopting] {
        assert_eq!(sent_by_two_agents(begins), [90, 4]);
    }
}

/// Nor by the same agent, when it has to read everything once more.
#[test]
fn what_became_suspect_and_did_not_change_is_not_sent_again() {
    let mut world = three_files();
    let backup = Backup::default();
    let (mut engine, _) = begin(&mut world, Border::Everything, &backup, CheckpointId(0), Begins::Afresh);
    let mut written = Vec::new();
    for _ in 0..3 {
        let request = Request { tag: String::new(), trigger: "manual", wall_ns: 0, stop: Stop::IfNeeded };
        engine.checkpoint(&mut world, &request).unwrap();
        let mut backup = std::mem::take(&mut world.base);
        for (batch, _) in std::mem::take(&mut world.shipped) {
            backup.apply(&batch);
        }
        assert_eq!(backup.dump(), world.fs.dump(&|_, _| true));
        written.push(std::mem::take(&mut backup.written));
        world.base = backup;
        world.fs.inodes.get_mut(&101).unwrap().data[9] += 1;
        engine.suspect_everything(world.now());
    }
    assert_eq!(written, [90, 4, 4]);
}

/// Bytes of files that the first agent sends, and the second, which comes after 4 of them were changed.
fn sent_by_two_agents(begins: Begins) -> Vec<usize> {
    let mut world = three_files();
    let mut backup = Backup::default();
    let mut sent = Vec::new();
    for round in 0..2 {
        let (mut engine, _) = begin(&mut world, Border::Everything, &backup, CheckpointId(round), begins);
        let request = Request { tag: String::new(), trigger: "manual", wall_ns: 0, stop: Stop::IfNeeded };
        engine.checkpoint(&mut world, &request).unwrap();
        for (batch, _) in std::mem::take(&mut world.shipped) {
            backup.apply(&batch);
        }
        assert_eq!(backup.dump(), world.fs.dump(&|_, _| true));
        sent.push(std::mem::take(&mut backup.written));
        // Unseen, and with the same size.
        world.fs.inodes.get_mut(&101).unwrap().data[9] = 77;
    }
    // The same objects, whatever inodes they were.
    assert_eq!(backup.highest().0, 4);
    sent
}

/// Three files of 30 bytes, and no program.
fn three_files() -> World {
    let mut world = World::new(1, 1, 0);
    for file in 0..3 {
        let mut inode = Fs::inode(FileKind::Regular, 1);
        inode.links = 1;
        inode.data = (0..30).map(|n| n + file).collect();
        world.fs.inodes.insert(100 + u64::from(file), inode);
        let root = world.fs.inodes.get_mut(&ROOT).unwrap();
        root.entries.insert(vec![b'a' + file], 100 + u64::from(file));
    }
    world
}

/// In some runs all files have followers: what is read for these between checkpoints changes none of them.
fn followed(seed: u64) -> Table {
    let classes: &[Class] = match seed % 3 {
        0 => &[Class::Write],
        1 => &[Class::Close],
        _ => &[],
    };
    let policies = classes.iter().map(|class| Policy { backup: *class, ..Policy::new("*").unwrap() });
    Table::new(policies.collect()).unwrap()
}

/// The state that the calls make which started at or before `at_ns`. What a later one did where nothing is
/// taken is there as well: it is in no cut, and a covered call may have succeeded by it.
fn expected(base: &Fs, done: &[Done], at_ns: u64, border: Border) -> Vec<String> {
    let dump = |fs: &Fs| fs.dump(&|path, kind| border.takes(path, kind));
    let mut fs = base.clone();
    for done in done.iter().filter(|d| d.ok) {
        if done.start_ns <= at_ns {
            fs.run(&done.call, done.stamp, done.fresh);
        } else if !matches!(border, Border::Everything) {
            let mut with = fs.clone();
            with.run(&done.call, done.stamp, done.fresh);
            if dump(&with) == dump(&fs) {
                fs = with;
            }
        }
    }
    dump(&fs)
}

fn run(seed: u64) -> (u32, u32) {
    let mut world = World::new(seed, 1 + (seed % 4) as usize, 250);
    let border = Border::of(seed);
    world.symlinks_lead = matches!(border, Border::Everything);
    // Some of the tree is there before, and the program runs while it is copied first.
    for _ in 0..200 {
        world.step();
    }
    let mut backup = Backup::default();
    let (mut engine, mut base) = begin(&mut world, border, &backup, CheckpointId(0), Begins::Afresh);
    let policies = followed(seed);
    engine.set_policies(&policies, true);
    world.stops = 0;
    world.asynchronous = seed.is_multiple_of(3);
    let (mut checkpoints, mut afresh) = (0, 0);
    while world.calls_left > 0 || checkpoints < 2 {
        for _ in 0..world.random.next(60) {
            world.step();
        }
        if seed % 5 == 1 && world.random.next(2) == 0 {
            // The backup is away for long: nothing but notes until it is back.
            engine.drain(&mut world).unwrap();
            engine.flush(&mut world).unwrap();
            engine.note_only(true);
            let before = world.shipped.len();
            for _ in 0..world.random.next(4) {
                for _ in 0..world.random.next(60) {
                    world.step();
                }
                engine.drain(&mut world).unwrap();
                engine.flush(&mut world).unwrap();
            }
            engine.note_only(false);
            let noted = world.shipped[before..].iter().flat_map(|(batch, _)| backup::records(batch));
            let bytes = noted.filter(|r| matches!(r, Record::Write { .. } | Record::Meta { .. })).count();
            assert_eq!(bytes, 0, "seed {seed}: neither content nor attributes while things are only noted");
        }
        if world.random.next(2) == 0 {
            engine.drain(&mut world).unwrap();
            engine.flush(&mut world).unwrap();
        }
        if checkpoints > 0 && !policies.is_empty() && world.random.next(2) == 0 {
            engine.follow_now(&mut world).unwrap();
            engine.flush(&mut world).unwrap();
        }
        let stop = if world.random.next(6) == 0 { Stop::Hold } else { Stop::IfNeeded };
        let request = Request { tag: String::new(), trigger: "manual", wall_ns: 0, stop };
        let taken = engine.checkpoint(&mut world, &request).unwrap();
        if stop == Stop::Hold {
            world.go();
        }
        checkpoints += 1;
        assert!(durable(&mut world, &mut backup, &base, Some(&taken), border), "the marker was shipped");
        // The agent dies, and another begins, while the program goes on; perhaps more than once.
        let mut last = taken.checkpoint;
        while checkpoints >= 2 && seed.is_multiple_of(2) && world.random.next(2) == 0 {
            last = dies(&mut world, &mut engine, (&mut backup, &base), last, border);
            let begins = match world.random.next(4) {
                _ if world.asynchronous => Begins::GoingOn,
                0 => Begins::Adopting,
                // That the one before began afresh is nowhere but in its records.
                _ if backup.next == afresh => Begins::Afresh,
                1 => Begins::Afresh,
                _ => Begins::GoingOn,
            };
            let (next, stands) = begin(&mut world, border, &backup, last, begins);
            engine = next;
            if begins != Begins::GoingOn {
                (base, afresh) = (stands, backup.next);
            }
            if world.asynchronous {
                engine.expect_asynchronous();
            }
            engine.set_policies(&policies, true);
        }
    }
    (checkpoints, world.stops)
}

/// Seeds that went wrong once: what stood at a name was read again, and counted as of the look before; a covered call reached by a
/// name outside what one that is not covered had moved there.
const ONCE_WRONG: [u64; 2] = [238_156, 438_745];

#[test]
fn every_checkpoint_is_the_state_that_its_calls_made() {
    // A failing seed reproduces with BFS_SEED, BFS_SEEDS is how many are tried; BFS_LONG is set by `cargo xtask test --long`.
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let one = number("BFS_SEED");
    let many = if std::env::var_os("BFS_LONG").is_some() { 200_000 } else { 6000 };
    if one.is_some() && number("BFS_SEEDS").is_none() {
        // Every event and every read, to see what went wrong.
        let _ = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).without_time().try_init();
    }
    let seeds = match (one, number("BFS_SEEDS")) {
        (Some(first), many) => first..first + many.unwrap_or(1),
        (None, tried) => 1..tried.unwrap_or(many),
    };
    let once_wrong = ONCE_WRONG.into_iter().filter(|_| one.is_none());
    let (mut checkpoints, mut stops) = (0, 0);
    for seed in seeds.chain(once_wrong) {
        let (c, s) = run(seed);
        checkpoints += c;
        stops += s;
    }
    println!("{checkpoints} checkpoints, {stops} with a stop");
}
