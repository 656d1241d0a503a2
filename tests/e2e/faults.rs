//! Calls of the replayer that fail while a program works and the real agent sends: the program goes on, the agent
//! is told, nothing wrong is confirmed, and when the fault is gone all goes on by itself. (Each call in turn, with
//! a scripted agent: bfs-agent/tests/faults.rs.)

use std::sync::atomic::{AtomicBool, Ordering};

use bfs_tests::exercise;
use bfs_tests::faults::{Effect, Fault, Faults};
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::random::Random;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, rounds};

/// The disk of the spool fails (EIO), once or until it was told, while the backup is away: the program goes on, status
/// says it, and in the end nothing is missing.
#[test]
fn calls_below_the_spool_fail_while_the_backup_is_away() {
    let mut world = World::new("faults-spool", Transport::Unix).unwrap();
    world.faults_of_agents(Faults::new(&world.spool()));
    world.start(&AppendWriters, How::AttachHalfWay).unwrap();
    world.checkpoint().unwrap();
    let mut random = Random::printed();
    let mut hit = 0;
    for index in 0..rounds(6, 60) {
        let lasting = index % 2 == 1;
        let at = 1 + random.below(if lasting { 12 } else { 40 }) as u64;
        let fault = Fault { at, lasting, effect: Effect::Fails(libc::EIO), torn: random.chance(50) };
        world.agent_faults().expect("given above").set(fault);
        world.kill_replayer().unwrap();
        if lasting {
            let said = until("the spool's trouble to be told", SOON, || {
                // What is written by reference is read for a checkpoint.
                let _ = world.agent_command(&["checkpoint", "--wait", "sealed", "--timeout", "1s"], SOON);
                // That of the round before may still be told.
                let failed = !world.agent_faults().expect("given above").failed().is_empty();
                world.status().ok()?["spool"]["trouble"].as_str().filter(|_| failed).map(str::to_owned)
            })
            .unwrap();
            assert!(said.contains("Input/output error"), "{said}");
            world.agent_faults().expect("given above").lift();
        }
        let sealed = world.checkpoint_until("sealed").unwrap();
        assert!(world.program_runs(), "the program goes on");
        hit += usize::from(!world.agent_faults().expect("given above").failed().is_empty());
        world.start_replayer().unwrap();
        world.wait_applied(sealed).unwrap();
        exercise::cut(&world, &AppendWriters, index).unwrap();
    }
    assert!(hit >= rounds(6, 60) / 2, "{hit} faults came about");
    exercise::stopped(&world, 0).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

#[test]
fn calls_of_the_replayer_fail_during_appends() {
    let mut world = World::new("faults", Transport::Unix).unwrap();
    let faults = Faults::new(&world.store);
    world.replayer_faults(faults);
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    let mut random = Random::printed();
    for index in 0..rounds(8, 120) {
        let error = *random.of(&[libc::ENOSPC, libc::EIO]);
        let (at, lasting) = (1 + random.below(60) as u64, index % 2 == 1);
        let fault = Fault { at, lasting, effect: Effect::Fails(error), torn: random.chance(50) };
        let faults = world.faults().expect("given above");
        faults.set(fault);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // What lasts is mended when somebody was told.
            let mender = scope.spawn(|| {
                let told = until("somebody to be told", SOON, || {
                    let replayer = world.replayer_status().ok();
                    let agent = world.status().ok();
                    let trouble = replayer.is_some_and(|s| s["trouble"].is_string());
                    let lost = agent.is_some_and(|s| s["destinations"][0]["connected"] == false);
                    (done.load(Ordering::SeqCst) || (trouble || lost) && !faults.failed().is_empty())
                        .then_some(())
                });
                faults.lift();
                told
            });
            let cut = exercise::cut(&world, &AppendWriters, index);
            done.store(true, Ordering::SeqCst);
            let told = mender.join().expect("it does not panic");
            if let Err(error) = cut.and(told) {
                panic!("{fault:?} {:?}: {error:#}", faults.failed());
            }
        });
        assert!(world.program_runs(), "the program goes on");
    }
    world.faults().expect("given above").lift();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
