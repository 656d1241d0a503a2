//! What the daemons tell a service manager, heard by a small socket in its place; and the units themselves.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bfs_tests::exercise;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};

/// How long a daemon may be silent.
const WITHIN: Duration = Duration::from_secs(2);

struct Manager(UnixDatagram);

impl Manager {
    /// Daemons that are started from now on are told to report here.
    fn of(world: &mut World) -> Self {
        let path = world.place.aux.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        world.daemon_environment("NOTIFY_SOCKET", &path.display().to_string());
        world.daemon_environment("WATCHDOG_USEC", &WITHIN.as_micros().to_string());
        Self(socket)
    }

    fn hear(&self) -> String {
        let mut bytes = [0; 4096];
        let length = self.0.recv(&mut bytes).expect("a daemon reports");
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    fn hear_until(&self, word: &str) {
        while !self.hear().lines().any(|line| line == word) {}
    }

    /// Signs of life come in time for `long`.
    fn watch(&self, long: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < long {
            let heard = Instant::now();
            self.hear_until("WATCHDOG=1");
            assert!(heard.elapsed() < WITHIN, "silent for {:?}", heard.elapsed());
        }
    }
}

#[test]
fn a_replayer_says_when_it_serves_and_that_it_lives() {
    let mut world = World::new("service-replayer", Transport::Unix).unwrap();
    let manager = Manager::of(&mut world);
    world.start_replayer().unwrap();
    manager.hear_until("READY=1");
    // Whoever waited for that can use it at once.
    UnixStream::connect(world.address()).unwrap();
    manager.watch(WITHIN * 2);
    let pid = world.replayer_pid() as i32;
    // SAFETY: a system call without pointers, on our own child.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    manager.hear_until("STOPPING=1");
}

#[test]
fn an_agent_that_was_killed_is_followed_by_one_that_goes_on() {
    let mut world = World::new("service-agent", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let manager = Manager::of(&mut world);
    let cgroup = world.cgroup("followed").unwrap();
    let whom = ["--resume", "--cgroup", &cgroup.display().to_string()].map(str::to_owned);
    let whom: Vec<&str> = whom.iter().map(String::as_str).collect();
    // There is something to copy first.
    std::fs::write(world.place.data.join("much"), vec![7; 64 << 20]).unwrap();
    world.attach_to(&whom).unwrap();
    manager.hear_until("READY=1");
    let mut writer = world
        .spawn_shell(
            "while [ ! -e \"$2/go\" ]; do sleep 0.01; done
             i=0; while [ ! -e \"$2/stop\" ]; do i=$((i + 1)); echo $i >> \"$1/log\"; done",
        )
        .unwrap();
    // What it did before it is in there nobody would follow.
    std::fs::write(cgroup.join("cgroup.procs"), writer.id().to_string()).unwrap();
    std::fs::write(world.place.aux.join("go"), "").unwrap();
    world.checkpoint().unwrap();
    manager.watch(WITHIN);
    let captured = world.status_number(&["records"]).unwrap();
    let log = world.place.data.join("log");
    let written = || std::fs::metadata(&log).map_or(0, |meta| meta.len());
    let before = written();

    world.kill_agent().unwrap();
    until("the program to go on", SOON, || (written() > before + 100).then_some(())).unwrap();
    world.attach_to(&whom).unwrap();
    manager.hear_until("READY=1");
    // The probes are those of the agent before.
    assert!(world.status_number(&["records"]).unwrap() >= captured);
    exercise::stopped(&world, 0).unwrap();

    std::fs::write(world.place.stop(), "").unwrap();
    assert!(writer.wait().unwrap().success());
    world.stop_agent().unwrap();
    exercise::equal(&world).unwrap();
}

#[test]
fn the_units_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("bfs-agent").join("systemd");
    let into = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        // Where they run the programs are installed; here they need not be.
        let text = std::fs::read_to_string(&path).unwrap().replace("/usr/bin/bfs-", "/bin/true bfs-");
        let name = path.file_name().unwrap().to_str().unwrap().replace('@', "@x");
        let copy = into.path().join(name);
        std::fs::write(&copy, text).unwrap();
        let said = Command::new("systemd-analyze").arg("verify").arg(&copy).output().unwrap();
        let words = String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success() && words.trim().is_empty(), "{}: {words}", path.display());
    }
}
