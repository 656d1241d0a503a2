//! The interface for programs: what docs/interface.md shows is run as it stands; updates that are reported are in the
//! next checkpoint; and whatever clients do, the agent goes on.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use bfs_tests::exercise;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, binary};
use serde_json::Value;

fn socket(world: &World) -> PathBuf {
    PathBuf::from(format!("/run/bfs/agent-{}.sock", world.group))
}

/// A client that knows nothing but lines.
struct Lines(BufReader<UnixStream>);

impl Lines {
    fn connect(world: &World) -> Self {
        let stream = UnixStream::connect(socket(world)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self(BufReader::new(stream))
    }

    fn says(&mut self, line: &[u8]) -> &mut Self {
        self.0.get_mut().write_all(line).unwrap();
        self
    }

    fn hears(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the connection ended: {line:?}");
        Ok(serde_json::from_str(&line)?)
    }

    fn asks(&mut self, request: &str) -> Value {
        self.says(format!("{request}\n").as_bytes()).hears().unwrap()
    }
}

/// The code blocks of the documentation: the language, and the text.
fn blocks(text: &str) -> Vec<(&str, String)> {
    let mut all: Vec<(&str, String)> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(_) if inside => inside = false,
            Some(language) => {
                inside = true;
                all.push((language, String::new()));
            }
            None if inside => {
                let block = &mut all.last_mut().expect("one was begun").1;
                block.push_str(line);
                block.push('\n');
            }
            None => {}
        }
    }
    all
}

/// Every number is as good as every other.
fn without_numbers(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let digit = c.is_ascii_digit();
        if !(digit && out.ends_with('0')) {
            out.push(if digit { '0' } else { c });
        }
    }
    out
}

/// A world whose program rests, with a file of some blocks.
fn resting(name: &str, options: &[&str]) -> World {
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.agent_options(options);
    fs::write(world.place.data.join("table"), vec![b'.'; 64 << 10]).unwrap();
    world.start_replayer().unwrap();
    world.rest().unwrap();
    world.checkpoint().unwrap();
    world
}

#[test]
fn the_documented_examples_do_what_they_say() {
    let mut world = resting("interface", &[]);
    let text = include_str!("../../docs/interface.md");
    let here = |text: &str| {
        text.replace("/run/bfs/agent-demo.sock", &socket(&world).display().to_string())
            .replace("/srv/data", &world.place.data.display().to_string())
    };
    let blocks = blocks(text);
    let mut ran = 0;
    for pair in blocks.windows(2) {
        let [(language, code), (_, said)] = pair else { unreachable!() };
        let mut command = match *language {
            "sh" => Command::new("sh"),
            "python" => Command::new("python3"),
            _ => continue,
        };
        let done = command.arg("-c").arg(here(code)).stdin(Stdio::null()).output().unwrap();
        let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{code}\n{out}{err}");
        assert_eq!(without_numbers(&out), without_numbers(&here(said)), "{code}\n{err}");
        ran += 1;
    }
    assert_eq!(ran, 4, "the examples are found");
    let table = fs::read(world.backup().join("table")).unwrap();
    assert_eq!(&table[4096..4100], b"new.", "the checkpoint has what the example wrote");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// With `--foreign ignore` nobody takes notice of what the test writes: but for what it reports.
#[test]
fn a_reported_update_is_in_the_next_checkpoint_and_nothing_else_is_read() {
    let mut world = resting("report", &["--foreign", "ignore"]);
    let path = world.place.data.join("table");
    let file = File::options().write(true).open(&path).unwrap();
    let backup = |world: &World, at: usize| fs::read(world.backup().join("table")).unwrap()[at];
    let report = |world: &World, range: &str| {
        let request = format!(r#"{{"request":"report_update","path":"{}"{range}}}"#, path.display());
        let answer = Lines::connect(world).asks(&request);
        assert_eq!(answer["reply"], "reported", "{answer}");
        answer["after"].as_u64().unwrap()
    };
    file.write_at(b"a", 0).unwrap();
    file.write_at(b"b", 40_000).unwrap();
    world.checkpoint().unwrap();
    assert_eq!((backup(&world, 0), backup(&world, 40_000)), (b'.', b'.'), "it was to be ignored");

    let after = report(&world, r#","offset":40000,"length":1"#);
    let number = world.checkpoint().unwrap();
    assert!(number > after);
    assert_eq!((backup(&world, 0), backup(&world, 40_000)), (b'.', b'b'), "only what was reported");

    // What was acknowledged is not forgotten by who comes next.
    file.write_at(b"c", 50_000).unwrap();
    report(&world, r#","offset":50000,"length":1"#);
    world.kill_agent().unwrap();
    world.resume().unwrap();
    world.checkpoint().unwrap();
    assert_eq!(backup(&world, 50_000), b'c');

    // It grew, and it was cut: the size counts, whatever the report says.
    file.write_at(b"d", 100_000).unwrap();
    report(&world, r#","offset":0,"length":1"#);
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    file.set_len(10).unwrap();
    report(&world, r#","offset":0,"length":1"#);
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();

    // By a link and over `..`, whole.
    file.write_at(b"e", 5).unwrap();
    let link = world.place.aux.join("link");
    std::os::unix::fs::symlink(&world.place.data, &link).unwrap();
    let by_link = link.join("../data/table");
    let request = format!(r#"{{"request":"report_update","path":"{}"}}"#, by_link.display());
    assert_eq!(Lines::connect(&world).asks(&request)["reply"], "reported");
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
}

/// The agent works on while all of this goes on.
#[test]
fn no_client_holds_the_agent_up() {
    let mut world = World::new("clients", Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    let answered = |client: &mut Lines, says: &str| {
        let answer = client.hears().unwrap();
        assert_eq!(answer["kind"], "bad", "{answer}");
        assert!(answer["message"].as_str().unwrap().contains(says), "{says}: {answer}");
    };

    // Lines that cannot be, and after each the connection is as good as before.
    let mut client = Lines::connect(&world);
    let long = vec![b'x'; 1 << 20];
    client.says(&long).says(b"\n");
    answered(&mut client, "longer than 65536 bytes");
    client.says(b"{\"request\":\"st\xffatus\"}\n");
    answered(&mut client, "byte 15 of the line is not UTF-8");
    client.says(b"\n");
    answered(&mut client, "empty");
    let deep = "[".repeat(60_000);
    client.says(format!("{deep}\n").as_bytes());
    answered(&mut client, "not a request");
    client.says(b"{\"request\":\"status\"\n");
    answered(&mut client, "not a request");
    assert_eq!(client.asks(r#"{"request":"status"}"#)["reply"], "status");

    // The last line needs no end; half a request asks nothing.
    let mut client = Lines::connect(&world);
    client.says(br#"{"request":"status"}"#).0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.hears().unwrap()["reply"], "status");
    let mut client = Lines::connect(&world);
    client.says(br#"{"request":"stop""#).0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    answered(&mut client, "not a request");

    // Some say nothing, some stop in the midst of a line, some ask again and again and do not read.
    let mut idle: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(socket(&world)).unwrap()).collect();
    for stream in idle.iter_mut().step_by(3) {
        // Those that were too many are gone already.
        let _ = stream.write_all(b"{\"request\":");
    }
    let answer_of_command = until("a command to be answered", SOON, || world.status().ok());
    assert!(answer_of_command.is_ok(), "silent clients keep commands out");
    let mut deaf = Vec::new();
    for _ in 0..8 {
        let stream = UnixStream::connect(socket(&world)).unwrap();
        stream.set_nonblocking(true).unwrap();
        while (&stream).write(b"{\"request\":\"status\"}\n{\"request\":\"flush\"}\n").is_ok() {}
        deaf.push(stream);
    }
    for round in 0..5 {
        exercise::cut(&world, &AppendWriters, round).unwrap();
    }
    drop((idle, deaf));
    let status = world.status().unwrap();
    assert_eq!(status["state"], "following");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn only_root_and_the_user_of_the_agent_may_ask() {
    let world = World::new("peers", Transport::Unix).unwrap();
    let at = world.root().join("agent.sock");
    let line = format!(
        "exec {} run --group {} --socket {} --path $1 --backup dir:{} --spool {} -- sleep 1000",
        binary("bfs-agent").display(),
        world.group,
        at.display(),
        world.store.display(),
        world.spool().display(),
    );
    let mut agent = world.spawn_shell(&line).unwrap();
    let to = format!("UNIX-CONNECT:{}", at.display());
    // Who is turned away is told before he has asked: writing can fail then, so that one only listens.
    let hears = |words: &[&str], says: &[u8]| -> Result<Value> {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        child.stdin.take().context("piped")?.write_all(says)?;
        let mut said = String::new();
        child.stdout.take().context("piped")?.read_to_string(&mut said)?;
        child.wait()?;
        Ok(serde_json::from_str(&said)?)
    };
    let asks = || hears(&["socat", "-t", "60", "-", &to], b"{\"request\":\"status\"}\n");
    let nobody =
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "socat", "-u", &to, "-"];
    let root = until("the agent to answer", SOON, || asks().ok()).unwrap();
    assert_eq!(root["reply"], "status");
    assert_eq!(fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(hears(&nobody, b"").is_err(), "the socket lets others connect");
    // Were the mode another one, the kernel still says who asks.
    fs::set_permissions(&at, fs::Permissions::from_mode(0o666)).unwrap();
    let refused = hears(&nobody, b"").unwrap();
    assert_eq!((&refused["reply"], &refused["kind"]), (&Value::from("failed"), &Value::from("denied")));
    // SAFETY: a system call without pointers; the child was not waited for, so the number is its own.
    assert_eq!(unsafe { libc::kill(agent.id() as i32, libc::SIGTERM) }, 0);
    let ended = until("the agent to end", SOON, || agent.try_wait().transpose()).unwrap().unwrap();
    assert_eq!(ended.code(), Some(128 + libc::SIGTERM));
}
