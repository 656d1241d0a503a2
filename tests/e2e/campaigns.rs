//! Random programs that hunt for differences: checkpoints all the time, each compared or checked.

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::names::{self, RandomNames};
use bfs_tests::programs::sequences::{
    Back, CHECKPOINT, Hunt, Manner, Operation, Pace, Paths, Sequence, Sequences, Way, all, core, parse,
    shrink,
};
use bfs_tests::random::{Random, printed_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, rounds};

#[test]
fn random_names_in_three_shared_directories() {
    let _ = printed_seed();
    let mut world = World::new("random-names", Transport::Tcp).unwrap();
    exercise::checkpoints(&mut world, &RandomNames, How::Run, rounds(8, 120)).unwrap();
    names::made_at_least(&world.place.data, rounds(2_000, 200_000) as u64).unwrap();
}

/// The agent comes when they are at work, again and again: what each is in, or holds open, it did not see.
#[test]
fn random_names_that_agents_are_attached_to() {
    let _ = printed_seed();
    let mut world = World::new("random-attached", Transport::Unix).unwrap();
    world.start(&RandomNames, How::AttachHalfWay).unwrap();
    for index in 0..rounds(6, 60) {
        if index > 0 {
            world.stop_agent().unwrap();
            world.attach().unwrap();
        }
        // Whoever just changed something was a stranger when the probes saw it.
        assert_eq!(world.status_number(&["selected_threads"]).unwrap(), names::PROCESSES as u64 + 1);
        exercise::stopped(&world, index).unwrap();
    }
    assert!(world.finish().unwrap().success());
}

/// What is moved while it is compared, a directory with all that is in it too, is not called different.
#[test]
fn random_names_are_compared_while_they_work() {
    let _ = printed_seed();
    let mut world = World::new("random-verify", Transport::Unix).unwrap();
    world.start(&RandomNames, How::Run).unwrap();
    let place = world.place.clone();
    until("the program half way", SOON, || RandomNames.half_way(&place).then_some(())).unwrap();
    for round in 0..rounds(4, 100) {
        let verified = world.agent_command(&["verify"], SOON).unwrap();
        let said = String::from_utf8_lossy(&verified.stdout);
        assert!(matches!(verified.status.code(), Some(0 | 2)), "round {round}: {said}");
    }
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

const MANNERS: [Manner; 6] = [
    Manner { threads: 1, paths: Paths::Absolute, pace: Pace::Steps },
    Manner { threads: 1, paths: Paths::Working, pace: Pace::AtOnce },
    Manner { threads: 4, paths: Paths::Descriptor, pace: Pace::AtOnce },
    Manner { threads: 1, paths: Paths::Descriptor, pace: Pace::Steps },
    Manner { threads: 4, paths: Paths::Above, pace: Pace::Steps },
    Manner { threads: 1, paths: Paths::Above, pace: Pace::AtOnce },
];

/// Sequences of one batch.
const BATCH: usize = 400;

/// Does the sequences in batches, each batch in another manner.
fn hunted(name: &str, sequences: &[Sequence]) {
    hunted_in(name, MANNERS.into_iter().cycle().zip(sequences.chunks(BATCH)));
}

/// Does batches, each in its manner.
fn hunted_in<'a>(name: &str, batches: impl Iterator<Item = (Manner, &'a [Sequence])>) {
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.start(&Sequences, How::Run).unwrap();
    let mut hunt = Hunt::new(&world);
    let mut small = Vec::new();
    for (manner, batch) in batches {
        let failures = hunt.batch(manner, batch).unwrap();
        for failure in failures.into_iter().take(5) {
            eprintln!("{manner:?}: {failure:#?}");
            small.push((manner, shrink(failure, |shorter| hunt.batch(manner, shorter)).unwrap()));
        }
        if small.len() > 20 {
            break;
        }
    }
    assert!(small.is_empty(), "the backup differed after: {small:#?}");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// What a backup was wrong after once, and what is like it.
#[test]
fn sequences_that_were_wrong_once() {
    let sequences: Vec<Sequence> = [
        // The name outside that was linked is another file's when the record of that is read.
        "rename:b:n link:O/o:b whiteout:d/x:O/o",
        "rename:b:n link:O/o:b rename:d/x:O/o",
        "rename:b:n link:O/o:b exchange:d/x:O/o",
        "truncate-short:O/o rename:d/x:O/o",
        "truncate-long:O/o exchange:a:O/o",
        "link:b:O/n truncate-short:O/n rename:O/o:O/n",
        "link:b:O/n truncate-short:O/n rename:a:O/n",
        "link:b:O/n chmod:O/n rename:a:O/n",
        "link:b:O/n setxattr:O/n exchange:a:O/n",
        "rename:O/o:n rename:d/x:O/o",
        "rename:O/o:n whiteout:d/x:O/o",
        "rename:O/o:b rename:d/x:O/o",
        "exchange:O/o:a rename:d/x:O/o",
        "exchange:a:O/o rename:d/x:O/o exchange:O/o:a",
        "rename:O/d:n rename:d:O/d",
        "exchange:O/d:d rename:e:O/d",
    ]
    .into_iter()
    .map(|text| text.split(' ').map(|word| parse(word).expect("an operation")).collect())
    .collect();
    // Many at once, so that records are read when all is done.
    let many: Vec<Sequence> = sequences.iter().cycle().take(160).cloned().collect();
    hunted_in("found-sequences", MANNERS.into_iter().zip(std::iter::repeat(&many[..])));
}

fn randomly(random: &mut Random, among: &[Operation], count: usize, length: usize) -> Vec<Sequence> {
    (0..count).map(|_| (0..length).map(|_| *random.of(among)).collect()).collect()
}

#[test]
fn sequences_of_one_operation_and_of_two() {
    let mut random = Random::printed();
    let mut sequences: Vec<Sequence> = all(false).into_iter().map(|operation| vec![operation]).collect();
    let core = core(false);
    let pairs: Vec<Sequence> =
        core.iter().flat_map(|first| core.iter().map(|second| vec![*first, *second])).collect();
    if rounds(0, 1) == 1 {
        sequences.extend(pairs);
    } else {
        sequences.extend((0..400).map(|_| random.of(&pairs).clone()));
    }
    hunted("short-sequences", &sequences);
}

#[test]
fn random_sequences_of_many_operations() {
    let mut random = Random::printed();
    hunted("long-sequences", &randomly(&mut random, &all(false), rounds(300, 20_000), 8));
}

#[test]
fn random_sequences_with_shared_mappings() {
    let mut random = Random::printed();
    // One in ten or so is of the mapping.
    let mut among = core(true);
    let mapped: Vec<_> = among.iter().copied().filter(|o| o.verb.starts_with("map-")).collect();
    for _ in 0..3 {
        among.extend(&mapped);
    }
    hunted("mapped-sequences", &randomly(&mut random, &among, rounds(150, 5_000), 5));
}

/// A first half, a checkpoint, and a second half, each of up to this many operations.
const HALF: usize = 6;

/// Sequences of two halves, brought back to the checkpoint between them; each batch in another manner.
fn brought_back(name: &str, way: Way, among: &[Operation], count: usize) {
    let mut random = Random::printed();
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let mut back = Back::new(&mut world);
    let mut small = Vec::new();
    for index in 0..count.div_ceil(BATCH) {
        let Manner { threads, paths, .. } = MANNERS[index % MANNERS.len()];
        let batch: Vec<Sequence> = (0..BATCH.min(count))
            .map(|_| {
                let mut half = |least| {
                    let length = least + random.below(HALF + 1 - least);
                    (0..length).map(|_| *random.of(among)).collect::<Sequence>()
                };
                [half(0), vec![CHECKPOINT], half(1)].concat()
            })
            .collect();
        for failure in back.batch(way, threads, paths, &batch).unwrap().into_iter().take(5) {
            eprintln!("{way:?} {threads} {paths:?}: {failure:#?}");
            small.push(shrink(failure, |shorter| back.batch(way, threads, paths, shorter)).unwrap());
        }
        if small.len() > 20 {
            break;
        }
    }
    assert!(small.is_empty(), "the files differed after: {small:#?}");
}

#[test]
fn random_sequences_are_brought_back_by_hand() {
    brought_back("back-by-hand", Way::ByHand, &all(false), rounds(400, 20_000));
}

#[test]
fn random_sequences_are_brought_back_when_they_fail() {
    brought_back("back-on-failure", Way::OnFailure, &all(false), rounds(400, 20_000));
}

/// Operations that change much, more of them; and with shared mappings.
#[test]
fn random_core_sequences_are_brought_back() {
    brought_back("back-core", Way::ByHand, &core(true), rounds(200, 10_000));
    brought_back("back-core-failure", Way::OnFailure, &core(true), rounds(200, 10_000));
}
