//! The primary is brought back: after a command that failed, on demand, with a kill -9 in the middle.
//! Each time the files must be those of the copy that was made at the checkpoint.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use bfs_tests::faults::{Effect, Fault, Faults};
use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, command_ok, rounds};
use bfs_tests::{copy, oracle};

/// `bfs-agent VERB` for the world's directory and destination.
fn agent(world: &World, verb: &str, more: &[&str]) -> Output {
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let mut words = vec![verb, "--checkpoint", "manual", "--path", &path, "--backup", &backup];
    words.extend(more);
    world.agent_command(&words, SOON * 3).unwrap()
}

fn said(done: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr))
}

fn equal(then: &Path, now: &Path, what: &str) {
    assert_eq!(oracle::compare(then, now).unwrap(), Vec::<String>::new(), "{what}");
}

fn nothing_is_left(world: &World) {
    for directory in [world.root(), &world.place.data] {
        let left = fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name());
        let left: Vec<_> = left.filter(|n| n.to_string_lossy().starts_with(".bfs")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn shell(script: &str, at: &Path) {
    command_ok(Command::new("/bin/sh").args(["-ec", script]).current_dir(at)).unwrap();
}

/// Something of everything.
const BEFORE: &str = "
    mkdir -p a/b/c empty; echo one > a/one; echo two > a/b/two; ln a/one a/b/linked; ln -s one a/link
    head -c 300000 /dev/urandom > big; truncate -s 2000000 sparse
    printf x | dd of=sparse bs=1 seek=1500000 conv=notrunc status=none
    mkfifo fifo; mknod null c 1 3; chmod 4751 a/b/two; chown 7:8 a/link a/b/c -h
    printf cut > cut; touch -d 2001-02-03 a/b empty
";

/// And something that goes wrong with all of it.
const UPGRADE: &str = "
    mv a/b a/one empty/; mv a empty/b/c/a; mkdir a; mv empty/b a/b
    echo more >> a/b/two; rm cut; echo other > cut
    printf changed | dd of=big bs=1 seek=100000 conv=notrunc status=none; truncate -s 5000 sparse
    rm fifo null; mkdir fifo; echo new > fifo/file; ln -sf elsewhere a/link
    cp --attributes-only --preserve=xattr \"$OTHER\" empty/one
    chmod 700 a/b/two; chown 0:0 a/b/c; mkdir -p deep/er/and/deeper; echo x > deep/er/and/deeper/x
    mv big deep/er/big; exit 3
";

#[test]
fn a_command_that_fails_leaves_nothing_behind() {
    let mut world = World::new("rollback-run", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    shell(BEFORE, &world.place.data);
    let xattr = |at: &Path, name: &str, value: &str| {
        rustix::fs::setxattr(at, name, value.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
    };
    xattr(&world.place.data.join("a/one"), "user.color", "red");
    xattr(&world.place.data.join("a"), "user.kind", "tree");
    let other = world.scratch.join("other");
    fs::write(&other, "").unwrap();
    xattr(&other, "user.color", "blue");
    xattr(&other, "user.more", "x");
    let then = world.scratch.join("then");
    copy::exact(&world.place.data, &then).unwrap();
    let inode = |path: &str| {
        use std::os::unix::fs::MetadataExt;
        fs::symlink_metadata(world.place.data.join(path)).unwrap().ino()
    };
    let stays = ["a/one", "big", "a/b/c", "sparse"];
    let before = stays.map(inode);
    let script = format!("OTHER='{}'; cd '{}'; {UPGRADE}", other.display(), world.place.data.display());
    let done = agent(&world, "run", &["--rollback-on-failure", "--", "/bin/sh", "-ec", &script]);
    assert_eq!(done.status.code(), Some(3), "{}", said(&done));
    equal(&then, &world.place.data, &said(&done));
    equal(&then, &world.backup(), "the backup");
    assert_eq!(stays.map(inode), before, "files that still exist keep their inodes");
    nothing_is_left(&world);
    // One that does not fail is left alone.
    let script = format!("cd '{}'; echo fine > fine", world.place.data.display());
    let done = agent(&world, "run", &["--rollback-on-failure", "--", "/bin/sh", "-ec", &script]);
    assert_eq!(done.status.code(), Some(0), "{}", said(&done));
    assert!(world.place.data.join("fine").exists());
    // What it did is undone on demand.
    let dry = agent(&world, "rollback", &["--dry-run", "--to", "tag:before run"]);
    assert!(
        dry.status.success() && said(&dry).contains("removed    ") && said(&dry).contains("fine"),
        "{}",
        said(&dry)
    );
    assert!(world.place.data.join("fine").exists());
    let done = agent(&world, "rollback", &["--to", "tag:before run"]);
    assert!(done.status.success(), "{}", said(&done));
    equal(&then, &world.place.data, &said(&done));
    equal(&then, &world.backup(), "the backup");
}

/// `run --rollback-on-failure` of a command that fails in the end: it does the one thing, then waits until `go`
/// is there, then does the other. Gives the process, which waits, and `go`.
fn held(world: &World, options: &[&str], first: &str, then: &str) -> (Child, PathBuf) {
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let (go, went) = (world.scratch.join("go"), world.scratch.join("went"));
    let script = format!(
        "cd '{path}'; {first}; touch '{}'; until [ -e '{}' ]; do sleep 0.02; done; {then}; exit 1",
        went.display(),
        go.display()
    );
    let mut words = vec!["run", "--checkpoint", "manual", "--path", &path, "--backup", &backup];
    words.extend(options);
    words.extend(["--rollback-on-failure", "--", "/bin/sh", "-ec", &script]);
    let child = world.spawn_agent_command(&words).unwrap();
    until("the command to work", SOON, || went.exists().then_some(())).unwrap();
    (child, go)
}

#[test]
fn what_others_did_is_left_alone() {
    let mut world = World::new("rollback-others", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    shell("echo theirs > theirs; echo ours > ours; mkdir d", &world.place.data);
    let (mut child, go) = held(&world, &[], "echo changed > ours", "true");
    fs::write(world.place.data.join("theirs"), "changed by somebody else").unwrap();
    fs::write(go, "").unwrap();
    let status = until("the end", SOON * 2, || child.try_wait().unwrap()).unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(fs::read_to_string(world.place.data.join("ours")).unwrap(), "ours\n");
    assert_eq!(fs::read_to_string(world.place.data.join("theirs")).unwrap(), "changed by somebody else");
}

#[test]
fn nothing_is_touched_while_somebody_uses_it() {
    let mut world = World::new("rollback-used", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    shell("echo 1 > file; echo 1 > other", &world.place.data);
    let data = world.place.data.display().to_string();
    let done = agent(&world, "run", &["--", "/bin/sh", "-c", &format!("cd '{data}'; true")]);
    assert!(done.status.success(), "{}", said(&done));
    let first = generations_newest(&world);
    let done =
        agent(&world, "run", &["--", "/bin/sh", "-c", &format!("cd '{data}'; echo 2 > file; rm other")]);
    assert!(done.status.success(), "{}", said(&done));
    let open = fs::OpenOptions::new().append(true).open(world.place.data.join("file")).unwrap();
    let mut other = Command::new("/bin/cat").stdin(Stdio::piped()).stdout(open).spawn().unwrap();
    let used = agent(&world, "rollback", &["--to", &first]);
    assert_eq!(used.status.code(), Some(73), "{}", said(&used));
    assert!(said(&used).contains(&format!("process {}", other.id())), "{}", said(&used));
    assert_eq!(fs::read_to_string(world.place.data.join("file")).unwrap(), "2\n");
    drop(other.stdin.take());
    other.wait().unwrap();
    let done = agent(&world, "rollback", &["--to", &first]);
    assert!(done.status.success(), "{}", said(&done));
    assert_eq!(fs::read_to_string(world.place.data.join("file")).unwrap(), "1\n");
    assert_eq!(fs::read_to_string(world.place.data.join("other")).unwrap(), "1\n");
}

fn generations_newest(world: &World) -> String {
    world.replayer_status().unwrap()["applied"].to_string()
}

#[test]
fn without_the_backup_nothing_is_touched_and_the_way_on_is_said() {
    let mut world = World::new("rollback-lost", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    shell("echo 1 > file", &world.place.data);
    let (child, go) = held(&world, &["--final-wait", "1s"], "true", "echo 2 > file");
    world.kill_replayer().unwrap();
    fs::write(go, "").unwrap();
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(76), "{}", said(&done));
    assert_eq!(fs::read_to_string(world.place.data.join("file")).unwrap(), "2\n");
    // The command that it names does it.
    let text = said(&done);
    let line = text.lines().find_map(|l| l.trim().strip_prefix("what to do: bfs-agent ")).unwrap();
    world.start_replayer().unwrap();
    let words: Vec<&str> = line.split(' ').collect();
    let mut command = Command::new(bfs_tests::world::binary("bfs-agent"));
    command_ok(command.args(&words)).unwrap();
    assert_eq!(fs::read_to_string(world.place.data.join("file")).unwrap(), "1\n");
}

/// Two states of a program's files, and the checkpoints that they are of.
struct States {
    world: World,
    /// The number, and a copy.
    all: [(String, PathBuf); 2],
}

/// A program works, a checkpoint is copied, the program works on and ends.
fn two_states(program: &dyn Program, name: &str) -> States {
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.start(program, How::Run).unwrap();
    let place = world.place.clone();
    until("the program half way", SOON, || program.half_way(&place).then_some(())).unwrap();
    let then = world.scratch.join("then");
    let number = world.checkpoint_stopped(&copy::command(&world.place.data, &then)).unwrap().to_string();
    let far = program.progress(&place.data).unwrap();
    until("the program to work on", SOON, || (program.progress(&place.data).ok()? > far).then_some(()))
        .unwrap();
    assert!(world.finish().unwrap().success());
    let end = world.scratch.join("end");
    copy::exact(&world.place.data, &end).unwrap();
    let last = generations_newest(&world);
    States { world, all: [(number, then), (last, end)] }
}

/// A rollback that was killed, or of which the replayer was; `None` when it went to its end.
fn killed_in_rollback(world: &mut World, words: &[&str], moments: &mut Random, left: bool) -> Option<String> {
    // The moment of the kill is what is tested: after the first file was made for it, or after the intent was
    // written down, or when everything that is displaced stands aside.
    let folder = world.root().join(format!(".bfs-rollback-{}", world.group));
    let seen = match moments.below(100) {
        0..40 => folder.clone(),
        40..80 => folder.join("journal"),
        _ => folder.join("detached"),
    };
    let wait = Duration::from_micros(moments.below(40_000) as u64);
    let of_replayer = moments.chance(25);
    let mut child = world.spawn_agent_command(words).unwrap();
    let (mut begun, mut replayer_killed) = (None, false);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if left && begun.is_none() && seen.exists() {
            begun = Some(Instant::now());
        }
        if !replayer_killed && begun.is_some_and(|begun: Instant| begun.elapsed() >= wait) {
            if !of_replayer {
                child.kill().unwrap();
                break child.wait().unwrap();
            }
            world.kill_replayer().unwrap();
            world.start_replayer().unwrap();
            replayer_killed = true;
        }
        std::thread::sleep(Duration::from_micros(if left { 200 } else { 5000 }));
    };
    let there = ["", "journal", "detached"].map(|name| folder.join(name).exists());
    let moment = format!("killed after {wait:?}: staging, intent, all aside: {there:?}");
    if status.signal() == Some(libc::SIGKILL) {
        // Both sides know that the files are between two states.
        let said = &world.replayer_status().unwrap()["rolling_back"];
        let to = words.last().expect("the checkpoint");
        assert!(!there[1] || said.as_u64() == to.parse().ok(), "{moment}: {said}");
        return Some(moment);
    }
    let output = child.wait_with_output().unwrap();
    assert!(status.success() || replayer_killed, "{status}: {}", said(&output));
    (!status.success()).then(|| format!("the replayer {moment}: {}", said(&output)))
}

/// Back and forth, agent and replayer killed on the way at random moments.
fn back_and_forth(program: &dyn Program, name: &str) {
    let States { mut world, all } = two_states(program, name);
    let mut moments = Random::printed();
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let (began, mut killed) = (Instant::now(), 0);
    for round in 0.. {
        let (to, copy) = &all[round % 2];
        let words = ["rollback", "--path", &path, "--backup", &backup, "--to", to];
        let mut kills = Vec::new();
        while let Some(moment) =
            killed_in_rollback(&mut world, &words, &mut moments, kills.len() < rounds(4, 10))
        {
            eprintln!("{moment}");
            kills.push(moment);
        }
        equal(copy, &world.place.data, &format!("back to checkpoint {to} after {kills:#?}"));
        equal(copy, &world.backup(), "the backup");
        assert!(world.replayer_status().unwrap()["rolling_back"].is_null());
        nothing_is_left(&world);
        killed += kills.len();
        if killed >= rounds(10, 500) || began.elapsed() > Duration::from_secs(3600) {
            eprintln!("{killed} kills in {} rollbacks, {:?}", round + 1, began.elapsed());
            break;
        }
    }
}

/// Back and forth, killed before each change that going back makes in turn, and once more while that is finished.
#[test]
fn names_back_and_forth_killed_at_each_change() {
    let States { world, all } = two_states(&RandomNames, "rollback-changes");
    let mut random = Random::new(given_seed().unwrap_or(20_261_127));
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let mut faults = Faults::new(world.root());
    let (mut killed, mut at, mut missed) = (0, 1 + random.next() % 20, 0);
    let began = Instant::now();
    for round in 0.. {
        let (to, copy) = &all[round % 2];
        let words = ["rollback", "--path", &path, "--backup", &backup, "--to", to];
        let mut hit = Vec::new();
        for moment in [Some(at), Some(1 + random.next() % 150), None] {
            faults.lift();
            if let Some(at) = moment {
                faults.set(Fault { at, lasting: false, effect: Effect::Kills, torn: random.chance(50) });
            }
            let done = world.spawn_faulty_command(&words, &mut faults).unwrap().wait_with_output().unwrap();
            if done.status.signal() == Some(libc::SIGKILL) {
                hit.extend(faults.failed());
                continue;
            }
            assert!(done.status.success(), "{hit:?}: {}", said(&done));
            break;
        }
        equal(copy, &world.place.data, &format!("back to checkpoint {to}, killed at {hit:?}"));
        equal(copy, &world.backup(), "the backup");
        nothing_is_left(&world);
        killed += hit.len();
        missed = if hit.is_empty() { missed + 1 } else { 0 };
        if killed >= rounds(6, 1000) || began.elapsed() > Duration::from_secs(3600) {
            break;
        }
        // The two ways do not have the same number of changes; behind the last of both it begins again.
        at = if missed >= 2 { 1 + random.next() % 7 } else { at + rounds(61, 3) as u64 };
    }
    eprintln!("{killed} kills in {:?}", began.elapsed());
}

#[test]
fn what_still_runs_is_ended_and_what_others_did_goes_back_if_asked_for() {
    let mut world = World::new("rollback-all", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    shell("echo theirs > theirs; echo ours > ours; touch -d 2001-02-03 theirs", &world.place.data);
    let then = world.scratch.join("then");
    copy::exact(&world.place.data, &then).unwrap();
    // One ends when it is told to, one does not; both hold a file.
    let first = "exec 3>>ours; sh -c 'exec sleep 1000' & \
                 sh -c 'trap \"\" TERM; while :; do sleep 0.05; done' & echo changed > ours";
    let options = ["--kill-descendants", "--include-foreign"];
    let (child, go) = held(&world, &options, first, "true");
    fs::write(world.place.data.join("theirs"), "changed by somebody else").unwrap();
    fs::write(world.place.data.join("new"), "made by somebody else").unwrap();
    fs::write(go, "").unwrap();
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(1), "{}", said(&done));
    let text = said(&done);
    assert!(text.contains("brought back too (changed by others)") && text.contains("/theirs"), "{text}");
    equal(&then, &world.place.data, &text);
    equal(&then, &world.backup(), "the backup");
}

/// What a dead agent's program still does is ended; the state before going back is not kept for long.
#[test]
fn the_program_of_a_dead_agent_is_ended_and_the_present_state_discarded() {
    let mut world = World::new("rollback-stop", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    shell("echo 1 > file", &world.place.data);
    let then = world.scratch.join("then");
    copy::exact(&world.place.data, &then).unwrap();
    let (mut child, _go) = held(&world, &[], "exec 3>>file; echo 2 >&3", "true");
    child.kill().unwrap();
    child.wait().unwrap();
    let refused = agent(&world, "rollback", &["--to", "tag:before run"]);
    assert_eq!(refused.status.code(), Some(71), "{}", said(&refused));
    let done = agent(&world, "rollback", &["--to", "tag:before run", "--stop", "--discard"]);
    assert!(done.status.success(), "{}", said(&done));
    equal(&then, &world.place.data, &said(&done));
    let mut command = Command::new(bfs_tests::world::binary("bfs-replayer"));
    command.args(["generations", "--json", "--group", &world.group, "--store"]).arg(&world.store);
    let kept = String::from_utf8(command_ok(&mut command).unwrap().stdout).unwrap();
    assert!(kept.contains("discarded") && !kept.contains("before rollback"), "{kept}");
}

#[test]
fn names_back_and_forth() {
    back_and_forth(&RandomNames, "rollback-names");
}

#[test]
fn files_back_and_forth() {
    back_and_forth(&AppendWriters, "rollback-files");
}
