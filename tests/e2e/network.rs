//! The network fails while a program works: cut, silent, in one direction only, slow. The program never waits,
//! checkpoints are sealed meanwhile, afterwards the backup is equal, and what was sent follows what was touched.

use bfs_tests::exercise;
use bfs_tests::network::{Network, Proxy};
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::{BesideMuch, Program};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, number_named};

fn behind_a_proxy(name: &str, options: &[&str]) -> (World, Proxy) {
    let mut world = World::new(name, Transport::Tcp).unwrap();
    world.agent_options(options);
    let proxy = Proxy::new(world.address()).unwrap();
    world.through(proxy.address().to_owned());
    let program = &BesideMuch(&AppendWriters);
    world.start(program, How::Run).unwrap();
    world.checkpoint().unwrap();
    assert!(proxy.bytes() > BesideMuch::BYTES, "the first copy came this way");
    (world, proxy)
}

/// The program works on for a while.
fn goes_on(world: &World, lines: u64) {
    let program = &BesideMuch(&AppendWriters);
    let before = program.activity(&world.place).unwrap();
    until("the program to go on", SOON, || {
        (program.activity(&world.place).unwrap() > before + lines).then_some(())
    })
    .unwrap();
}

fn connected(world: &World) -> bool {
    world.status().unwrap()["destinations"][0]["connected"] == true
}

/// What came since then is of the program's own files, not a new copy.
fn followed_what_was_touched(world: &World, proxy: &Proxy, before: u64) {
    let (own, came) = (BesideMuch::own_bytes(&world.place).unwrap(), proxy.bytes() - before);
    let bound = BesideMuch::BYTES / 8 + 3 * own;
    assert!(came < bound.min(BesideMuch::BYTES), "{came} bytes, of {own} in use: that is a new copy");
}

/// Below the bound of the spool.
#[test]
fn each_failure_of_the_network_leaves_the_backup_equal() {
    let (mut world, proxy) = behind_a_proxy("network", &[]);
    let program = &BesideMuch(&AppendWriters);
    for (index, network) in [Network::Cut, Network::Silent, Network::OneWay].into_iter().enumerate() {
        let before = proxy.bytes();
        proxy.set(network);
        goes_on(&world, 500);
        let sealed = world.checkpoint_until("sealed").unwrap();
        until("the agent to notice", SOON, || (!connected(&world)).then_some(())).unwrap();
        goes_on(&world, 500);
        proxy.set(Network::Whole);
        world.wait_applied(sealed).unwrap();
        exercise::cut(&world, program, index).unwrap();
        followed_what_was_touched(&world, &proxy, before);
    }
    // Slow is not gone: what is sealed comes in the end.
    let before = proxy.bytes();
    proxy.set(Network::Slow);
    let sealed = world.checkpoint_until("sealed").unwrap();
    goes_on(&world, 500);
    proxy.set(Network::Whole);
    world.wait_applied(sealed).unwrap();
    exercise::stopped(&world, 4).unwrap();
    followed_what_was_touched(&world, &proxy, before);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Past the bound of the spool only what is touched is noted.
#[test]
fn a_network_that_is_away_too_long_costs_what_was_touched() {
    let (mut world, proxy) = behind_a_proxy("network-bound", &["--spool-size", "1M"]);
    let program = &BesideMuch(&AppendWriters);
    for (index, network) in [Network::Cut, Network::Silent].into_iter().enumerate() {
        let before = proxy.bytes();
        proxy.set(network);
        let noting = || world.status().unwrap()["spool"]["notes_only"] == true;
        until("the spool to be full", SOON, || noting().then_some(())).unwrap();
        goes_on(&world, 1000);
        proxy.set(Network::Whole);
        until("bytes to be sent again", SOON, || (!noting()).then_some(())).unwrap();
        exercise::cut(&world, program, index).unwrap();
        followed_what_was_touched(&world, &proxy, before);
    }
    let left = || number_named(&world.status().unwrap()["spool"], &["records"]).unwrap();
    until("the spool to be empty", SOON, || (left() == 0).then_some(())).unwrap();
    exercise::stopped(&world, 2).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
