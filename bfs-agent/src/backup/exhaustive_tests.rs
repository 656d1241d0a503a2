//! The applier, exhaustively: steps of one to four operations on a small tree that holds a directory in a directory,
//! a file with two names and one with one. All renames (over something or not), exchanges, links, deletes, new
//! files and directories, writes and cuts between seven places: so cycles, a directory that goes below its former
//! child, a name that is used again. A crash before each change of a step, and one more in the second try.

use std::sync::atomic::{AtomicUsize, Ordering};

use bfs_common::record::{Name, ObjectId, Record};
use bfs_tests::random::{Random, printed_seed};

use super::crash_tests::converges;
use super::model::{Model, TOP};

/// A directory and a name in it.
type Spot = (ObjectId, &'static str);

const ABOVE: ObjectId = ObjectId(2);
const BELOW: ObjectId = ObjectId(3);

const SPOTS: [Spot; 7] =
    [(TOP, "a"), (TOP, "b"), (TOP, "c"), (ABOVE, "a"), (ABOVE, "b"), (ABOVE, "c"), (BELOW, "a")];

/// Steps of several operations in a run of normal length, and in a long one.
const SAMPLES: [usize; 2] = [120, 3000];

#[derive(Clone, Copy, Debug)]
enum Op {
    Rename(Spot, Spot),
    Exchange(Spot, Spot),
    Link(Spot, Spot),
    File(Spot),
    Directory(Spot),
    Delete(Spot),
    Write(Spot),
    Cut(Spot),
}

fn all_ops() -> Vec<Op> {
    let mut all = Vec::new();
    for (index, from) in SPOTS.into_iter().enumerate() {
        all.extend([Op::File(from), Op::Directory(from), Op::Delete(from), Op::Write(from), Op::Cut(from)]);
        for (other, to) in SPOTS.into_iter().enumerate() {
            if other != index {
                all.extend([Op::Rename(from, to), Op::Link(from, to)]);
            }
            if other > index {
                all.push(Op::Exchange(from, to));
            }
        }
    }
    all
}

fn name(of: &str) -> Name {
    Name::new(of.as_bytes()).unwrap()
}

/// The tree before the step.
fn set_up(model: &mut Model) {
    let above = model.create(true);
    let below = model.create(true);
    assert_eq!((above, below), (ABOVE, BELOW));
    model.link(TOP, name("a"), above);
    model.link(ABOVE, name("a"), below);
    for (byte, spots) in
        [(1, vec![(TOP, "b"), (ABOVE, "c")]), (2, vec![(ABOVE, "b")]), (3, vec![(BELOW, "a")])]
    {
        let file = model.create(false);
        for (directory, of) in spots {
            model.link(directory, name(of), file);
        }
        write(model, file, 0, vec![byte; 5000]);
    }
}

fn write(model: &mut Model, file: ObjectId, offset: usize, data: Vec<u8>) {
    let bytes = &mut model.nodes.get_mut(&file).unwrap().data;
    let end = offset + data.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[offset..end].copy_from_slice(&data);
    model.records.push((Record::Write { object: file, offset: offset as u64 }, data));
    model.touch(file);
}

/// Does it, where it can be done.
fn apply(model: &mut Model, op: Op) {
    let there = |model: &Model, (directory, of): Spot| -> Option<Option<ObjectId>> {
        Some(model.nodes.get(&directory)?.entries.get(&name(of)).copied())
    };
    let file = |model: &Model, spot: Spot| {
        there(model, spot).flatten().filter(|object| !model.nodes[object].directory)
    };
    match op {
        Op::Rename(from, to) | Op::Exchange(from, to) => {
            if there(model, from).flatten().is_some() && there(model, to).is_some() {
                let exchange = matches!(op, Op::Exchange(..));
                model.rename(from.0, &name(from.1), to.0, &name(to.1), exchange);
            }
        }
        Op::Link(from, to) => {
            let (Some(object), Some(old)) = (file(model, from), there(model, to)) else { return };
            if old.is_none_or(|old| !model.below(old, object) && !model.below(old, to.0)) {
                model.link(to.0, name(to.1), object);
            }
        }
        Op::File(at) | Op::Directory(at) => {
            let Some(old) = there(model, at) else { return };
            if old.is_none_or(|old| !model.below(old, at.0)) {
                let new = model.create(matches!(op, Op::Directory(_)));
                model.link(at.0, name(at.1), new);
            }
        }
        Op::Delete(at) => {
            if there(model, at).flatten().is_some() {
                model.unlink(at.0, &name(at.1));
            }
        }
        Op::Write(at) => {
            if let Some(file) = file(model, at) {
                write(model, file, 1000, vec![9; 3000]);
            }
        }
        Op::Cut(at) => {
            if let Some(file) = file(model, at) {
                model.nodes.get_mut(&file).unwrap().data.resize(2000, 0);
                model.records.push((Record::Truncate { object: file, size: 2000 }, Vec::new()));
                model.touch(file);
            }
        }
    }
}

fn does(ops: &[Op], crashes: &[u64]) -> bool {
    converges(&[&set_up, &|model| ops.iter().for_each(|op| apply(model, *op))], 1, crashes)
}

/// Each change of the step once, and behind each one more; `every`: behind each every other. How many runs.
fn crash_everywhere(ops: &[Op], random: &mut Random, every: bool) -> usize {
    let mut runs = 0;
    for first in 0.. {
        runs += 1;
        if !does(ops, &[first]) {
            return runs;
        }
        for second in 0.. {
            runs += 1;
            let second = if every { second } else { random.below(20) as u64 };
            if !does(ops, &[first, second]) || !every {
                break;
            }
        }
    }
    unreachable!("a step has an end")
}

#[test]
fn small_steps_converge_from_every_crash() {
    let long = std::env::var_os("BFS_LONG").is_some();
    let all = all_ops();
    let mut random = Random::new(printed_seed());
    let mut cases: Vec<Vec<Op>> = all.iter().map(|op| vec![*op]).collect();
    let singles = cases.len();
    for _ in 0..SAMPLES[usize::from(long)] {
        cases.push((0..2 + random.below(3)).map(|_| *random.of(&all)).collect());
    }
    let (next, runs) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(ops) = cases.get(at) else { return };
                    let mut random = Random::new(at as u64);
                    let work = || crash_everywhere(ops, &mut random, long && at < singles);
                    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                        Ok(done) => runs.fetch_add(done, Ordering::Relaxed),
                        Err(_) => panic!("{ops:?}: see above"),
                    };
                }
            });
        }
    });
    println!("{} steps, {} runs", cases.len(), runs.into_inner());
}
