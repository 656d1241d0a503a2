//! How others learn that something is wrong: metrics, `status --check`, the command of `--alert`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use bfs_tests::exercise;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, binary};

/// What Prometheus would read, if anybody answers.
fn scrape(at: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(at).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    Some(body.to_owned())
}

/// The value of a line that begins so and has all of these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let line = text.lines().find(|line| {
        line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
    })?;
    line.rsplit_once(' ')?.1.parse().ok()
}

/// Status and output of `status --check`.
fn check(world: &World, what: &str) -> (i32, String) {
    let done = world.agent_command(&["status", "--check", what], Duration::from_secs(30)).unwrap();
    (done.status.code().unwrap(), String::from_utf8_lossy(&done.stdout).into_owned())
}

#[test]
fn what_is_wrong_is_seen_from_outside() {
    let mut world = World::new("watching", Transport::Unix).unwrap();
    let (metrics, log) = (world.root().join("metrics.sock"), world.place.aux.join("alerts"));
    let alert = format!("echo $BFS_GROUP $BFS_ALERT $BFS_STATE >> {}", log.display());
    let at = format!("unix:{}", metrics.display());
    world.agent_options(&["--metrics", &at, "--alert", &alert, "--alert-after", "2s"]);
    world.checkpoints("every=200ms");
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();

    // All is well.
    assert_eq!(check(&world, "lag=30s,spool=1G,connected").0, 0);
    let text = scrape(&metrics).unwrap();
    let group = format!("group=\"{}\"", world.group);
    assert!(value(&text, "bfs_lag_seconds", &[&group]).unwrap() < 30.0);
    assert_eq!(value(&text, "bfs_connected", &[]), Some(1.0));
    assert!(value(&text, "bfs_checkpoint", &["state=\"applied\""]).unwrap() >= 1.0);
    assert!(value(&text, "bfs_checkpoints_total", &["result=\"taken\""]).unwrap() >= 1.0);
    assert_eq!(value(&text, "bfs_state", &["state=\"following\""]), Some(1.0));
    assert!(!log.exists());

    // The backup is away: that is told once, and its end once.
    world.kill_replayer().unwrap();
    let told = |world: &World| -> Vec<String> {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.replace(&world.group, "G").lines().map(str::to_owned).collect()
    };
    let all_told = |world: &World, what: &[&str]| {
        until("the alerts", SOON, || what.iter().all(|w| told(world).iter().any(|t| t == w)).then_some(()))
    };
    all_told(&world, &["G unconfirmed begins", "G away begins"]).unwrap();
    let stands = |world: &World| world.status().unwrap()["destinations"][0].clone();
    let away = stands(&world);
    assert_eq!(away["standing"], "detached");
    assert!(away["why"].as_str().is_some_and(|why| !why.is_empty()), "{away}");
    let (status, said) = check(&world, "lag=1s,connected");
    assert!(status == 1 && said.contains("lag: ") && said.contains("connected: "), "{status}: {said}");
    let text = scrape(&metrics).unwrap();
    assert!(value(&text, "bfs_lag_seconds", &[&group]).unwrap() > 1.0);
    assert_eq!(value(&text, "bfs_connected", &[]), Some(0.0));
    assert_eq!(value(&text, "bfs_standing", &["standing=\"detached\""]), Some(1.0));
    world.start_replayer().unwrap();
    all_told(&world, &["G unconfirmed ends", "G away ends"]).unwrap();
    assert_eq!(told(&world).len(), 4, "{:?}", told(&world));
    let back = stands(&world);
    assert_eq!((&back["standing"], &back["why"]), (&"attached".into(), &serde_json::Value::Null));
    assert!(back["since_ns"].as_i64() > away["since_ns"].as_i64());
    until("the lag to be small again", SOON, || (check(&world, "lag=20s,connected").0 == 0).then_some(()))
        .unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
    assert!(scrape(&metrics).is_none(), "it ends with the agent");
    assert_eq!(check(&world, "lag=1s").0, 72);

    // The replayer has numbers of its own.
    world.kill_replayer().unwrap();
    let line = format!(
        "exec {} serve --store {} --metrics {at}",
        binary("bfs-replayer").display(),
        world.store.display()
    );
    let mut replayer = world.spawn_shell(&line).unwrap();
    let text = until("the replayer's metrics", SOON, || scrape(&metrics)).unwrap();
    assert!(
        value(&text, "bfs_replayer_checkpoint", &[&group, "state=\"applied\""]).unwrap() >= 1.0,
        "{text}"
    );
    assert_eq!(value(&text, "bfs_replayer_agent_connected", &[&group]), Some(0.0));
    assert_eq!(value(&text, "bfs_replayer_store", &[&group, "state=\"ready\""]), Some(1.0));
    replayer.kill().unwrap();
    replayer.wait().unwrap();
}

/// A group in which nothing changes is not behind, however long ago its last checkpoint was; and what changes is seen at
/// once.
#[test]
fn who_rests_is_not_behind() {
    let mut world = World::new("resting", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let (ready, stop) = (world.place.aux.join("ready"), world.place.stop());
    let script = format!(
        "touch {0}; while ! [ -e {1} ]; do if [ -e {0}-write ]; then echo x >> {2}/f; rm {0}-write; fi; sleep 0.05; done",
        ready.display(),
        stop.display(),
        world.place.data.display()
    );
    world.run(&["sh".to_owned(), "-c".to_owned(), script]).unwrap();
    world.checkpoint().unwrap();
    let rests_since = std::time::Instant::now();
    until("two seconds of rest", SOON, || (rests_since.elapsed() > Duration::from_secs(2)).then_some(()))
        .unwrap();
    assert_eq!(check(&world, "lag=1s").0, 0);
    assert_eq!(world.status().unwrap()["lag_ms"], 0);
    // Checkpoints are taken by hand here, so what is written now waits.
    let write = world.place.aux.join("ready-write");
    fs::write(&write, "").unwrap();
    until("the lag", SOON, || (check(&world, "lag=1s").0 == 1).then_some(())).unwrap();
    world.checkpoint().unwrap();
    assert_eq!(world.status().unwrap()["lag_ms"], 0);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Should the primary's host be gone, the backup's tells it; an agent that was told to end is not missed.
#[test]
fn the_backup_tells_that_the_primary_is_gone() {
    let mut world = World::new("gone", Transport::Tcp).unwrap();
    let log = world.place.aux.join("alerts");
    let alert = format!("echo $BFS_GROUP $BFS_ALERT $BFS_STATE >> {}", log.display());
    world.replayer_options(&["--alert", &alert, "--alert-after", "1s"]);
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    let agent = |world: &World| world.replayer_status().unwrap()["agent"].clone();
    until("a heartbeat", SOON, || {
        agent(&world)["attached"]["round_trip_us"].as_u64().filter(|trip| *trip > 0)
    })
    .unwrap();
    let told = |world: &World, count: usize| {
        until("what is told", SOON, || {
            let text = fs::read_to_string(&log).unwrap_or_default().replace(&world.group, "G");
            let lines: Vec<_> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count).then_some(lines)
        })
        .unwrap()
    };
    world.kill_agent().unwrap();
    assert_eq!(told(&world, 1), ["G away begins"]);
    let lost = agent(&world)["lost"].clone();
    assert!(lost["since_ns"].as_i64() > Some(0) && lost["why"].is_string(), "{lost}");
    world.resume().unwrap();
    assert_eq!(told(&world, 2), ["G away begins", "G away ends"]);

    // No connection says that its other end stands still. When that goes on, so does all else.
    world.pause_agent(true).unwrap();
    let why =
        until("the silence to be noticed", SOON, || agent(&world)["lost"]["why"].as_str().map(str::to_owned))
            .unwrap();
    assert!(why.contains("nothing came from it for 10 s"), "{why}");
    world.pause_agent(false).unwrap();
    exercise::cut(&world, &AppendWriters, 0).unwrap();
    exercise::stopped(&world, 1).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
    let ended = until("the goodbye", SOON, || agent(&world)["ended"]["since_ns"].as_i64());
    assert!(ended.unwrap() > 0);
    assert_eq!(told(&world, 2).len(), 2, "what comes and goes is told once in a while");
}
