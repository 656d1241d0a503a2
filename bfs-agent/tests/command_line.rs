//! The real binary with bad input: each mistake has a sentence, a hint and a status of its own.

use std::path::Path;
use std::process::Command;

/// Status and standard error.
fn agent(arguments: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_bfs-agent"))
        .args(arguments)
        .envs(variables.iter().copied())
        .output()
        .expect("the binary starts");
    let error = String::from_utf8(output.stderr).unwrap();
    (output.status.code().expect("it is not killed"), error)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn each_mistake_has_its_status_and_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let (data, file) = (dir.path().join("data"), dir.path().join("file"));
    std::fs::create_dir(&data).unwrap();
    std::fs::write(&file, "").unwrap();
    let store = format!("dir:{}", dir.path().join("store").display());
    let inside = format!("dir:{}", data.join("store").display());
    let none = dir.path().join("none");
    let run = |path: &Path, backup: &str, more: &[&str], variables: &[(&str, &str)]| {
        let mut arguments = vec!["run", "--path", text(path), "--backup", backup];
        arguments.extend_from_slice(more);
        arguments.extend_from_slice(&["--", "true"]);
        let (status, error) = agent(&arguments, variables);
        assert!(error.starts_with("bfs-agent: ") && error.contains("\n  try: "), "{error}");
        (status, error)
    };
    assert_eq!(run(&none, &store, &[], &[]).0, 65);
    assert_eq!(run(&file, &store, &[], &[]).0, 65);
    assert_eq!(run(&data, &inside, &[], &[]).0, 65);
    assert_eq!(run(&data, &store, &["--path", text(&data)], &[]).0, 65);
    assert_eq!(run(&data, "tcp://127.0.0.1:1", &[], &[]).0, 64);
    assert_eq!(run(&data, &store, &["--map", "/elsewhere=/x"], &[]).0, 64);
    let (status, error) = run(&data, &store, &[], &[("BFS_BTF", "/does/not/exist")]);
    assert!(status == 67 && error.contains("BTF"), "{error}");

    assert_eq!(agent(&["run", "--path", "/x"], &[]).0, 64);
    assert_eq!(agent(&["--help"], &[]).0, 0);
    let attach = ["attach", "--path", text(&data), "--backup", &store];
    for more in
        [&[][..], &["--everyone", "--foreign", "refuse"], &["--everyone", "--pid", "1"], &["--cgroup", "/x"]]
    {
        assert_eq!(agent(&[&attach[..], more].concat(), &[]).0, 64);
    }
}

/// A file is looked at without starting anything; what is wrong in it is named.
#[test]
fn a_configuration_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/agent.toml");
    assert_eq!(agent(&["config", "check", example], &[]), (0, String::new()));
    for (content, why) in [
        ("[group.web]\nexclud = ['x']", "did you mean \"exclude\"?"),
        ("[group.web]\npaths = ['/a']\nbackup = 'dir:/x'\npid = 1\nexclude = ['[']", "the pattern"),
        ("group = 1", "group must be tables"),
        ("=", "line 1"),
    ] {
        std::fs::write(&file, content).unwrap();
        for line in [&["config", "check", text(&file)][..], &["--config", text(&file)]] {
            let (status, error) = agent(line, &[]);
            assert_eq!(status, 64, "{content}: {error}");
            assert!(error.contains(why), "{content}: {error}");
        }
    }
    assert_eq!(agent(&["--config", text(&dir.path().join("none"))], &[]).0, 64);
    assert_eq!(agent(&["--config", example, "--only", "none"], &[]).0, 64);
    assert_eq!(agent(&["--config", example, "status"], &[]).0, 64);
}

#[test]
fn commands_without_an_agent_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent-x.sock");
    let spool = dir.path().join("spool");
    for command in ["status", "flush", "verify", "stop", "checkpoint"] {
        // Where an agent before left a spool, flush sends it.
        let of_flush = ["--spool", text(&spool)];
        let more = if command == "flush" { &of_flush[..] } else { &[] };
        let (status, error) = agent(&[&[command, "--socket", text(&socket)], more].concat(), &[]);
        assert_eq!(status, 72, "{command}: {error}");
        assert!(error.contains(text(&socket)), "{error}");
    }
    assert_eq!(agent(&["verify", "--repair", "--socket", text(&socket)], &[]).0, 72);
}

#[test]
fn other_users_are_told_to_become_root() {
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("bfs-agent");
    // Copied by another process: a descriptor of ours that is open for writing would be inherited by what another
    // test starts just then, and the binary could not be executed (ETXTBSY).
    let copied = Command::new("cp").args([env!("CARGO_BIN_EXE_bfs-agent"), text(&binary)]).status();
    assert!(copied.unwrap().success());
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups", text(&binary)])
        .args(["run", "--path", text(dir.path()), "--backup", "unix:/x", "--", "true"])
        .output()
        .expect("this test needs setpriv and root");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(66), "{error}");
}

/// An agent of which only the control socket is real.
#[test]
fn stopped_runs_the_command_between_two_messages() {
    use bfs_agent::primary::control::{Inbound, Reply, Request, Server, WaitFor};
    use bfs_common::record::CheckpointId;
    use std::time::Duration;

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let (engine, inbound) = std::sync::mpsc::channel();
    let _server = Server::start("g", Some(&socket), engine, || {}).unwrap();
    let mark = dir.path().join("mark");
    let script = format!("echo $BFS_CHECKPOINT > {}; exit 3", mark.display());
    let child = Command::new(env!("CARGO_BIN_EXE_bfs-agent"))
        .args(["checkpoint", "--stopped", "--tag", "t", "--socket", text(&socket), "--", "sh", "-c", &script])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let next = || inbound.recv_timeout(Duration::from_secs(10)).unwrap();
    let Inbound::Request { request: Request::CheckpointStopped { tag, .. }, replies, ticket } = next() else {
        panic!()
    };
    assert_eq!(tag, "t");
    assert!(!mark.exists(), "nothing runs before the program stands");
    replies.send(Reply::Standing { checkpoint: CheckpointId(12), reached_us: 1 });
    let Inbound::Go { ticket: again } = next() else { panic!() };
    assert_eq!(ticket, again);
    assert_eq!(std::fs::read_to_string(&mark).unwrap(), "12\n");
    let checkpoint = CheckpointId(12);
    replies.send(Reply::Checkpoint { checkpoint, reached: WaitFor::Confirmed, stopped_us: 2 });
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(3), &b"12\n"[..]));
}
