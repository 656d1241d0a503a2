//! How the stream travels: no faster than the user allows, and compressed.

use std::fs;
use std::time::{Duration, Instant};

use bfs_tests::exercise;
use bfs_tests::network::Proxy;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};

const MIB: u64 = 1 << 20;

/// A program that waits for `go` and then runs `script` with `$1` for its directory, and so on for each number.
fn on_demand(world: &World, script: &str) -> Vec<String> {
    let script = format!(
        ": > \"$2/ready\"; n=1
        while [ ! -e \"$2/stop\" ]; do
            if [ -e \"$2/go-$n\" ]; then {script}; : > \"$2/done-$n\"; n=$((n + 1)); fi; sleep 0.02
        done"
    );
    world.script(&script)
}

/// Has it run the script once; how long that took it.
fn go(world: &World, number: u32) -> Duration {
    let began = Instant::now();
    fs::write(world.place.aux.join(format!("go-{number}")), "").unwrap();
    let done = world.place.aux.join(format!("done-{number}"));
    until("the program to have written", SOON, || done.exists().then_some(())).unwrap();
    began.elapsed()
}

/// What is sent is limited, and nobody waits for that but who asks for the backup: the program goes on, the checkpoint is
/// sealed in the spool, and confirmed when the link has carried it.
#[test]
fn a_limit_holds_the_stream_and_neither_program_nor_sealing() {
    let mut world = World::new("link-rate", Transport::Tcp).unwrap();
    world.agent_options(&["--rate-limit", "2M"]);
    world.start_replayer().unwrap();
    let script = "head -c 25165824 /dev/urandom > \"$1/much-$n\"";
    world.run(&on_demand(&world, script)).unwrap();
    world.checkpoint_until("applied").unwrap();
    let began = Instant::now();
    let wrote = go(&world, 1);
    let sealed = world.checkpoint_until("sealed").unwrap();
    let sealed_after = began.elapsed();
    let status = world.status().unwrap();
    let destination = &status["destinations"][0];
    assert_eq!(destination["rate_limit"], 2 * MIB, "{status}");
    assert_eq!(destination["held_back"], true, "{status}");
    assert_eq!(destination["connected"], true, "{status}");
    let why = status["not_confirmed_because"].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("--rate-limit"), "{status}");
    // What is sealed needs no room in the ring.
    let used = status["ring_used_bytes"].as_u64().unwrap();
    assert!(used < status["ring_bytes"].as_u64().unwrap() / 4, "{status}");
    let shown = world.agent_command(&["status"], SOON).unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("at most 2.0 MiB a second are sent; THAT HOLDS RECORDS BACK"), "{shown}");
    world.wait_applied(sealed).unwrap();
    let applied_after = began.elapsed();
    eprintln!("wrote {wrote:?}, sealed {sealed_after:?}, applied {applied_after:?}");
    // 24 MiB at 2 MiB a second, but for what counts as saved and the last piece.
    let least = Duration::from_millis(11_500);
    assert!(applied_after >= least, "{applied_after:?}");
    assert!(wrote < least / 2, "the program waited: {wrote:?}");
    assert!(sealed_after < applied_after * 3 / 4, "{sealed_after:?}, {applied_after:?}");
    let status = world.status().unwrap();
    assert_eq!(status["destinations"][0]["reconnects"], 0, "heartbeats go on: {status}");
    until("nothing to be held back", SOON, || {
        (world.status().unwrap()["destinations"][0]["held_back"] == false).then_some(())
    })
    .unwrap();

    // A replayer that dies meanwhile gets the rest, and a successor keeps to the limit.
    go(&world, 2);
    world.kill_replayer().unwrap();
    let began = Instant::now();
    world.checkpoint_until("sealed").unwrap();
    world.kill_agent().unwrap();
    world.start_replayer().unwrap();
    world.resume().unwrap();
    let sealed = world.checkpoint_until("confirmed").unwrap();
    assert!(began.elapsed() >= least - Duration::from_secs(2), "{:?}", began.elapsed());
    world.wait_applied(sealed).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

/// Past the bound of the spool only what is touched is noted, as when the backup is away; when the spool is sent that is read.
#[test]
fn more_than_limit_and_spool_hold_is_noted_and_sent_later() {
    let mut world = World::new("link-notes", Transport::Unix).unwrap();
    world.agent_options(&["--rate-limit", "4M", "--spool-size", "8M"]);
    world.start_replayer().unwrap();
    let script = "for i in 1 2 3 4 5 6; do head -c 8388608 /dev/urandom > \"$1/much-$i\"; done";
    world.run(&on_demand(&world, script)).unwrap();
    world.checkpoint_until("applied").unwrap();
    let wrote = go(&world, 1);
    let taken = until("only what is touched to be noted", SOON, || {
        // What is written by reference is read for a checkpoint.
        let _ = world.agent_command(&["checkpoint", "--wait", "sealed", "--timeout", "1s"], SOON);
        let status = world.status().unwrap();
        (status["spool"]["notes_only"] == true).then_some(status)
    });
    eprintln!("wrote {wrote:?}");
    assert_eq!(taken.unwrap()["destinations"][0]["connected"], true);
    assert!(world.program_runs());
    let noting = |world: &World| world.status().unwrap()["spool"]["notes_only"].as_bool().unwrap();
    until("bytes to be sent again", SOON, || (!noting(&world)).then_some(())).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

/// Text travels in a fraction of its bytes, what cannot be compressed as it is, and the backup is the same.
fn compressed_over(name: &str, transport: Transport) {
    let mut world = World::new(name, transport).unwrap();
    world.agent_options(&["--compress"]);
    let proxy = (transport == Transport::Tcp).then(|| Proxy::new(world.address()).unwrap());
    if let Some(proxy) = &proxy {
        world.through(proxy.address().to_owned());
    }
    world.start_replayer().unwrap();
    // A log, and the second time noise.
    let script = "if [ $n = 2 ]; then head -c 8388608 /dev/urandom > \"$1/noise\"; else
        seq -f 'GET /items/%.0f HTTP/1.1 200 application/json' 1 200000 >> \"$1/log\"; fi";
    world.run(&on_demand(&world, script)).unwrap();
    world.checkpoint_until("applied").unwrap();
    let counts = |world: &World| {
        let status = world.status().unwrap();
        let destination = &status["destinations"][0];
        assert_eq!(destination["compressed"], true, "{status}");
        let number = |name: &str| destination[name].as_u64().unwrap();
        (number("sent_bytes"), number("wire_bytes"), proxy.as_ref().map_or(0, Proxy::bytes))
    };
    let mut before = counts(&world);
    let mut goes = |world: &World, number| {
        go(world, number);
        world.checkpoint_until("applied").unwrap();
        let now = counts(world);
        let went = (now.0 - before.0, now.1 - before.1, now.2 - before.2);
        eprintln!("{went:?}: bytes of records, of them on the wire, seen there");
        before = now;
        went
    };
    let (sent, wire, seen) = goes(&world, 1);
    assert!(sent > 8 * MIB && wire < sent / 3, "{wire} of {sent}");
    if proxy.is_some() {
        assert!(seen >= wire && seen < sent / 3, "{seen} bytes went over TCP for {sent}");
    }
    let (sent, wire, _) = goes(&world, 2);
    assert!(sent > 8 * MIB && wire <= sent && wire > sent - sent / 50, "{wire} of {sent}");
    // Another replayer process is asked again.
    world.kill_replayer().unwrap();
    go(&world, 3);
    world.start_replayer().unwrap();
    world.checkpoint_until("applied").unwrap();
    counts(&world);
    let shown = world.agent_command(&["status"], SOON).unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("were sent, compressed to"), "{shown}");
    exercise::stopped(&world, 0).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn what_is_compressed_over_tls_is_the_same_there() {
    compressed_over("link-lz4-tcp", Transport::Tcp);
}

#[test]
fn what_is_compressed_over_a_unix_socket_is_the_same_there() {
    compressed_over("link-lz4-unix", Transport::Unix);
}

#[test]
fn a_limit_that_no_record_could_keep_is_refused() {
    let mut world = World::new("link-refused", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let mut child = std::process::Command::new(bfs_tests::world::binary("bfs-agent"));
    child.args(["run", "--group", &world.group, "--backup", &world.destination(), "--path"]);
    child.arg(&world.place.data).args(["--rate-limit", "10K", "--", "/bin/true"]);
    let done = child.output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(64), "{said}");
    assert!(said.contains("at least 64K"), "{said}");
}
