//! Failover: a backup becomes the primary on another host, the one before is fenced and comes back. Two hosts with a wire
//! between them, TLS with their keys; everything that is given out is compared with copies.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use bfs_tests::hosts::Hosts;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{binary, rounds};
use bfs_tests::{copy, oracle};
use serde_json::Value;

/// The exit status of an agent that is fenced: `bfs-agent --help`.
const FENCED: i32 = 77;
/// Of a replayer that refuses: docs/operations.md.
const REFUSED: i32 = 17;

fn equal(a: &Path, b: &Path, what: &str) {
    assert_eq!(oracle::compare(a, b).unwrap(), Vec::<String>::new(), "{what}");
}

/// One of everything that can be lost.
fn furnish(data: &Path) {
    fs::create_dir_all(data.join("sub/deep")).unwrap();
    fs::write(data.join("sub/table"), vec![b'.'; 300_000]).unwrap();
    fs::set_permissions(data.join("sub/table"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(data.join("sub/table"), Some(1001), Some(1002)).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(data.join("sub/table"), "user.note", b"of the table", flags).unwrap();
    rustix::fs::setxattr(data.join("sub"), "user.dir", b"of a directory", flags).unwrap();
    let sparse = File::create(data.join("sparse")).unwrap();
    sparse.write_at(b"far", 64 << 20).unwrap();
    fs::write(data.join("empty"), "").unwrap();
    fs::write(data.join("one"), "linked").unwrap();
    fs::hard_link(data.join("one"), data.join("sub/two")).unwrap();
    symlink("empty", data.join("link")).unwrap();
    let fifo = std::ffi::CString::new(data.join("fifo").to_str().unwrap()).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    fs::set_permissions(data, fs::Permissions::from_mode(0o750)).unwrap();
    std::os::unix::fs::chown(data, Some(7), Some(8)).unwrap();
}

/// Two hosts, the first replicates a program that rests to the second; checkpoints with copies of each.
struct Kept(Vec<(u64, PathBuf)>);

impl Kept {
    /// Takes one more; nobody else changes the files of the host.
    fn take(&mut self, hosts: &Hosts, name: &str) -> u64 {
        let number = hosts.checkpoint(name).unwrap();
        let at = hosts.scratch(&format!("then-{}", self.0.len()));
        copy::exact(&hosts.host(name).data(), &at).unwrap();
        self.0.push((number, at));
        number
    }

    /// Every one that is kept in the store of a host equals its copy.
    fn all_equal(&self, hosts: &Hosts, store: &str, what: &str) {
        for (number, copy) in &self.0 {
            let to = hosts.scratch("restored");
            let mut restore = hosts.replayer(store, "restore");
            hosts.said(restore.args(["--at", &number.to_string()]).arg(&to)).unwrap();
            let below = to.join(hosts.a.place.data.strip_prefix("/").unwrap());
            equal(copy, &below, &format!("checkpoint {number} {what}"));
            fs::remove_dir_all(&to).unwrap();
        }
    }

    fn newest(&self) -> &Path {
        &self.0.last().unwrap().1
    }
}

fn begin(name: &str) -> (Hosts, Kept) {
    begin_on(name, None)
}

fn begin_on(name: &str, disk: Option<&str>) -> (Hosts, Kept) {
    let mut hosts = Hosts::with_disk(name, disk).unwrap();
    furnish(&hosts.a.data());
    hosts.serve("b").unwrap();
    hosts.pair("a", "b", &[]).unwrap();
    let (command, to) = (hosts.resting("a"), hosts.b.destination());
    hosts.run("a", &to, &command).unwrap();
    let mut kept = Kept(Vec::new());
    kept.take(&hosts, "a");
    (hosts, kept)
}

fn promote(hosts: &Hosts, name: &str, more: &[&str]) -> String {
    let mut command = hosts.replayer(name, "promote");
    hosts.said(command.args(["--to", "/"]).args(more)).unwrap()
}

/// The agent of the promoted host, with the store that stands beside it.
fn run_on_b(hosts: &mut Hosts) {
    let (command, socket) = (hosts.resting("b"), hosts.b.store().join("replayer.sock"));
    hosts.run("b", &format!("unix:{}", socket.display()), &command).unwrap();
}

#[test]
fn a_backup_becomes_the_primary_and_goes_on() {
    let (mut hosts, mut kept) = begin("promote");
    let data = hosts.a.data();
    fs::write(data.join("sub/later"), "in the second").unwrap();
    fs::rename(data.join("empty"), data.join("sub/deep/renamed")).unwrap();
    let last = kept.take(&hosts, "a");

    // As long as the primary answers nothing happens.
    let alive = hosts.output(hosts.replayer("b", "promote").args(["--to", "/"])).unwrap();
    let said = String::from_utf8_lossy(&alive.stderr).into_owned();
    assert!(alive.status.code() == Some(REFUSED) && said.contains("planned change"), "{said}");
    assert!(!hosts.b.data().exists() || fs::read_dir(hosts.b.data()).unwrap().next().is_none());
    let more = kept.take(&hosts, "a");
    assert!(more > last);

    // What no checkpoint has is not given out.
    fs::write(data.join("pending"), "never confirmed").unwrap();
    hosts.said(&mut hosts.agent("a", "flush")).unwrap();
    let said = promote(&hosts, "b", &["--force"]);
    assert!(said.contains(&format!("checkpoint {more} (")) && said.contains("left out: "), "{said}");
    equal(kept.newest(), &hosts.b.data(), "what was given out");
    let again = promote(&hosts, "b", &[]);
    assert!(again.contains("promoted before"), "{again}");

    // The primary before says so, and so does what it is started with again.
    let fenced = until("the old primary to be fenced", SOON, || {
        hosts.status("a").ok().filter(|status| status["state"] == "Fenced" || status["state"] == "fenced")
    })
    .unwrap();
    assert_eq!(fenced["fenced"]["at"], more);
    assert_eq!(fenced["fenced"]["host"], "b");
    assert_eq!(fenced["fenced"]["diverged"], true);
    assert_eq!(hosts.finish("a").unwrap(), FENCED);
    let (command, to) = (hosts.resting("a"), hosts.b.destination());
    let refused = hosts.run("a", &to, &command).unwrap_err().to_string();
    assert!(refused.contains("FENCED") && refused.contains("77"), "{refused}");

    // The new one goes on, and what stands there is not copied again.
    run_on_b(&mut hosts);
    let sent = hosts.status("b").unwrap()["counters"]["stream_bytes"].as_u64().unwrap();
    kept.take(&hosts, "b");
    let first = hosts.status("b").unwrap()["counters"]["stream_bytes"].as_u64().unwrap();
    assert!(first < 100_000, "{sent} and {first} bytes were sent for files that are there");
    equal(&hosts.b.data(), &hosts.b.store().join(tree(&hosts)), "after the first checkpoint");
    kept.all_equal(&hosts, "b", "after the promotion");
    for round in 0..5 {
        let data = hosts.b.data();
        fs::write(data.join("sub/table"), format!("round {round}").repeat(1000)).unwrap();
        fs::write(data.join(format!("new-{round}")), "x").unwrap();
        let _ = fs::remove_file(data.join("sub/later"));
        kept.take(&hosts, "b");
    }
    equal(&hosts.b.data(), &hosts.b.store().join(tree(&hosts)), "after a while");
    kept.all_equal(&hosts, "b", "after the program has run for a while");
    let status = hosts.replayer_status("b").unwrap();
    assert_eq!(status["history"]["at"], more);
    assert!(status["history"]["refused_ns"].is_i64(), "{status}");
    assert_eq!(hosts.finish("b").unwrap(), 0);
    hosts.kill_replayer("b").unwrap();
    let mut check = hosts.b.command(binary("bfs-replayer"));
    hosts.said(check.args(["check", "--read-data", "--store"]).arg(hosts.b.store())).unwrap();
}

/// The backup of the group below a store.
fn tree(hosts: &Hosts) -> PathBuf {
    Path::new("tree").join(&hosts.group).join(hosts.a.place.data.strip_prefix("/").unwrap())
}

/// Bytes as they stand in JSON.
fn text(bytes: &Value) -> String {
    let bytes = bytes.as_array().into_iter().flatten().filter_map(Value::as_u64).map(|b| b as u8);
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

/// Killed at some moment, with a replayer that serves or as the owner of the store: either nothing has happened, or the same
/// command finishes it; and never anything but the promoted checkpoint stands at the place.
#[test]
fn a_killed_promotion_is_finished_by_the_same_command() {
    let (mut hosts, mut kept) = begin("promote-killed");
    for n in 0..300 {
        fs::write(hosts.a.data().join(format!("sub/file-{n}")), vec![n as u8; 20_000]).unwrap();
    }
    kept.take(&hosts, "a");
    assert_eq!(hosts.finish("a").unwrap(), 0);
    let mut moments = Random::new(given_seed().unwrap_or(20_261_128));
    let (mut untouched, mut unfinished, mut done) = (0, 0, 0);
    let mut histories = 0;
    for round in 0..rounds(12, 200) {
        // Each is another one: to another place.
        let to = hosts.scratch(&format!("to-{round}"));
        let command = |hosts: &Hosts| {
            let mut command = hosts.replayer("b", "promote");
            command.arg("--to").arg(&to);
            command
        };
        let served = round % 2 == 0;
        if served && round > 0 {
            hosts.serve("b").unwrap();
        }
        let mut child = command(&hosts).spawn().unwrap();
        // The moment of the kill is what is tested.
        std::thread::sleep(std::time::Duration::from_micros(moments.below(250_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        if served {
            let history = hosts.replayer_status("b").unwrap()["history"].clone();
            if history["by"]["to"] == Value::Null || text(&history["by"]["to"]) != to.display().to_string() {
                untouched += 1;
            } else if history["stage"] == "done" {
                done += 1;
            } else {
                unfinished += 1;
            }
            histories += 1;
            if round % 4 == 0 {
                hosts.kill_replayer("b").unwrap();
            }
        }
        let at = to.join(hosts.a.place.data.strip_prefix("/").unwrap());
        let stands = fs::read_dir(&at).map(|entries| entries.flatten().any(|e| e.file_name() == "sub"));
        let whole =
            stands.is_ok_and(|stands| stands) && !at.join(format!(".bfs-promote-{}", hosts.group)).exists();
        hosts.said(&mut command(&hosts)).unwrap();
        equal(kept.newest(), &at, &format!("round {round}, where it stood before: {whole}"));
        fs::remove_dir_all(&to).unwrap();
        if served && round % 4 != 0 {
            hosts.kill_replayer("b").unwrap();
        }
    }
    assert!(histories > 0);
    println!("with a replayer: {untouched} were not begun, {unfinished} finished by the next, {done} done");
    kept.all_equal(&hosts, "b", "after it all");
}

/// The wire is cut, both sides write, it is mended: both say so, and nothing of either is lost. Then back to the first host.
#[test]
fn both_sides_of_a_cut_wire_keep_what_they_wrote() {
    let (mut hosts, mut kept) = begin("split");
    let common = kept.take(&hosts, "a");
    hosts.b.wire(false).unwrap();
    fs::write(hosts.a.data().join("sub/table"), "written on a, behind the cut").unwrap();
    fs::write(hosts.a.data().join("only-a"), "a").unwrap();
    let sealed = hosts.said(hosts.agent("a", "checkpoint").args(["--wait", "sealed"])).unwrap();
    assert!(sealed.trim().parse::<u64>().unwrap() > common);

    // It does not answer any more, so this needs no force.
    let promoted = until("the primary to be silent", SOON, || {
        let done = hosts.output(hosts.replayer("b", "promote").args(["--to", "/"])).unwrap();
        done.status.success().then(|| String::from_utf8(done.stdout).unwrap())
    })
    .unwrap();
    assert!(promoted.contains(&format!("checkpoint {common} (")), "{promoted}");
    equal(kept.newest(), &hosts.b.data(), "what was given out");
    run_on_b(&mut hosts);
    fs::write(hosts.b.data().join("sub/table"), "written on b").unwrap();
    fs::write(hosts.b.data().join("only-b"), "b").unwrap();
    kept.take(&hosts, "b");

    hosts.b.wire(true).unwrap();
    let fenced = until("the old primary to be fenced", SOON, || {
        hosts.status("a").ok().filter(|status| status["fenced"]["diverged"] == true)
    })
    .unwrap();
    assert_eq!(fenced["fenced"]["at"], common);
    let told = hosts.said(&mut hosts.agent("a", "status")).unwrap();
    assert!(told.contains("FENCED") && told.contains("diverged"), "{told}");
    let mut status = hosts.b.command(binary("bfs-replayer"));
    let told = hosts.said(status.args(["status", "--store"]).arg(hosts.b.store())).unwrap();
    assert!(told.contains("DIVERGED") && told.contains("promoted    on b"), "{told}");
    assert_eq!(hosts.finish("a").unwrap(), FENCED);

    // Nothing was changed on a; what it has goes beside the group that went on.
    let of_a = hosts.scratch("of-a");
    copy::exact(&hosts.a.data(), &of_a).unwrap();
    let mut surplus = hosts.agent("a", "surplus");
    surplus.arg("--path").arg(&hosts.a.place.data).args(["--backup", &hosts.b.destination(), "--keys"]);
    surplus.arg(hosts.a.own.join("keys")).arg("--spool").arg(hosts.a.own.join("spool"));
    let told = hosts.said(&mut surplus).unwrap();
    assert!(told.contains("surplus-a") && told.contains("the spool stands in"), "{told}");
    equal(&of_a, &hosts.a.data(), "on the host that is fenced");
    let surplus = format!("{}.surplus-a", hosts.group);
    let to = hosts.scratch("surplus");
    let mut restore = hosts.b.command(binary("bfs-replayer"));
    restore.args(["restore", "--group", &surplus, "--at", "tag:surplus of a", "--store"]);
    hosts.said(restore.arg(hosts.b.store()).arg(&to)).unwrap();
    equal(&of_a, &to.join(hosts.a.place.data.strip_prefix("/").unwrap()), "the surplus");
    kept.take(&hosts, "b");
    kept.all_equal(&hosts, "b", "on the side that went on");

    // Back: the first host takes over, with files from the store of the other one.
    assert_eq!(hosts.finish("b").unwrap(), 0);
    let back = |hosts: &Hosts| {
        let mut promote = hosts.a.command(binary("bfs-replayer"));
        promote.args(["promote", "--group", &hosts.group, "--connect", &hosts.b.destination(), "--to", "/"]);
        promote.arg("--keys").arg(hosts.a.own.join("keys"));
        promote
    };
    let refused = hosts.output(&mut back(&hosts)).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("is not empty"), "{said}");
    fs::rename(hosts.a.data(), hosts.a.own.join("srv/before")).unwrap();
    let refused = hosts.output(&mut back(&hosts)).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(REFUSED) && said.contains("administrate"), "{said}");
    hosts.pair("a", "b", &["--group", &hosts.group, "--may", "write,read,administrate"]).unwrap();
    hosts.said(&mut back(&hosts)).unwrap();
    equal(kept.newest(), &hosts.a.data(), "back on the first host");
    let (command, to) = (hosts.resting("a"), hosts.b.destination());
    hosts.run("a", &to, &command).unwrap();
    fs::write(hosts.a.data().join("back"), "again").unwrap();
    kept.take(&hosts, "a");
    equal(&hosts.a.data(), &hosts.b.store().join(tree(&hosts)), "the backup of the first host");
    kept.all_equal(&hosts, "b", "after all of it");
    assert_eq!(hosts.finish("a").unwrap(), 0);
}

/// Killed at single calls, with a replayer beside it and as the owner of the store.
#[test]
fn a_promotion_that_dies_at_any_call_is_finished_by_the_same_command() {
    let (mut hosts, mut kept) = begin("promote-calls");
    kept.take(&hosts, "a");
    assert_eq!(hosts.finish("a").unwrap(), 0);
    hosts.kill_replayer("b").unwrap();
    let calls = [
        ("mkdir", 2),
        ("mkdir", 4),
        ("linkat", 1),
        ("syncfs", 1),
        ("syncfs", 2),
        ("syncfs", 3),
        ("renameat2", 1),
        ("renameat2", 2),
        ("renameat2", 5),
        ("rmdir", 1),
        ("rmdir", 2),
        ("fchownat", 9),
        ("setxattr", 1),
        ("utimensat", 5),
    ];
    let mut died = 0;
    for (round, (call, when)) in calls.into_iter().enumerate() {
        let to = hosts.scratch(&format!("to-{round}"));
        let at = to.join(hosts.a.place.data.strip_prefix("/").unwrap());
        let served = round % 2 == 0;
        if served {
            hosts.serve("b").unwrap();
        }
        let mut strace = hosts.host("b").command("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
        strace.args(["-e", &format!("inject={call}:signal=SIGKILL:when={when}")]).arg(binary("bfs-replayer"));
        strace.args(["promote", "--group", &hosts.group, "--store"]).arg(hosts.b.store());
        let killed = hosts.output(strace.arg("--to").arg(&to)).unwrap();
        died += usize::from(!killed.status.success());
        if at.join("one").exists() && !at.join(format!(".bfs-promote-{}", hosts.group)).exists() {
            // All of it was moved: nothing but attributes can be missing.
            assert!(at.join("sub/two").exists() && at.join("sparse").exists(), "{call} {when}");
        }
        let mut again = hosts.replayer("b", "promote");
        hosts.said(again.arg("--to").arg(&to)).unwrap_or_else(|e| panic!("{call} {when}: {e}"));
        equal(kept.newest(), &at, &format!("killed at {call} {when}"));
        if served {
            hosts.kill_replayer("b").unwrap();
        }
    }
    assert!(died >= calls.len() - 2, "{died} of {} died", calls.len());
    kept.all_equal(&hosts, "b", "after it all");
}

/// Where store and place lie on one btrfs the files share their blocks, and are the program's own all the same.
#[test]
fn files_share_their_blocks_where_they_can() {
    let (mut hosts, kept) = begin_on("promote-shared", Some("btrfs"));
    assert_eq!(hosts.finish("a").unwrap(), 0);
    // A store of the same checkpoint on a file system that can.
    let at = hosts.disk();
    let store = at.join("store");
    let mut send = hosts.replayer("b", "send");
    let stream = hosts.scratch("stream");
    let last = hosts.replayer_status("b").unwrap()["applied"].as_u64().unwrap();
    send.args(["--to", &last.to_string()]).stdout(File::create(&stream).unwrap());
    hosts.said(&mut send).unwrap();
    let replayer = |verb: &str| {
        let mut command = hosts.b.command(binary("bfs-replayer"));
        command.args([verb, "--store"]).arg(&store);
        command
    };
    hosts.said(replayer("receive").arg(&stream)).unwrap();
    let group = ["--group", &hosts.group];
    for (verb, to) in [("promote", "--test"), ("promote", "--to")] {
        let place = at.join(to);
        let told = hosts.said(replayer(verb).args(group).arg(to).arg(&place)).unwrap();
        let files = place.join(hosts.a.place.data.strip_prefix("/").unwrap());
        equal(kept.newest(), &files, to);
        assert!(shares(&files.join("sub/table")), "{told}");
        fs::write(files.join("sub/table"), "the program's own").unwrap();
        fs::write(files.join("one"), "changed in place").unwrap();
    }
    hosts.said(replayer("check").arg("--read-data")).unwrap();
    let to = hosts.scratch("restored");
    hosts.said(replayer("restore").args(group).args(["--at", &last.to_string()]).arg(&to)).unwrap();
    equal(kept.newest(), &to.join(hosts.a.place.data.strip_prefix("/").unwrap()), "what the store has");
}

/// Whether a file shares blocks with another one, as filefrag(8) tells.
fn shares(file: &Path) -> bool {
    let done = std::process::Command::new("filefrag").arg("-v").arg(file).output().unwrap();
    String::from_utf8_lossy(&done.stdout).contains("shared")
}

/// Appends numbered lines at full speed, wherever it finds its files; each time it goes on where they end.
fn counting(hosts: &Hosts, name: &str) -> Vec<String> {
    let place = &hosts.host(name).place;
    let script = format!(
        "cd '{}' && n=$(wc -l < journal) && touch '{}'; \
         while :; do n=$((n+1)); echo $n >> journal; echo $n > last.new; mv last.new last; done",
        place.data.display(),
        place.aux.join("ready").display()
    );
    ["sh", "-c", &script].map(str::to_owned).to_vec()
}

/// The primary changes hosts there and back while the program works as fast as it can: no line is lost, ever.
#[test]
fn the_primary_changes_hosts_under_load_and_nothing_is_lost() {
    const ENDED_BY_TERM: i32 = 143;
    let mut hosts = Hosts::new("switch").unwrap();
    furnish(&hosts.a.data());
    fs::write(hosts.a.data().join("journal"), "").unwrap();
    hosts.serve("b").unwrap();
    hosts.pair("a", "b", &[]).unwrap();
    let mut lines = 0;
    for round in 0..rounds(6, 20) {
        let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        // The store stays on b: its own agent comes over a socket of the host.
        let backup = match from {
            "a" => hosts.b.destination(),
            _ => format!("unix:{}", hosts.b.store().join("replayer.sock").display()),
        };
        let command = counting(&hosts, from);
        hosts.run(from, &backup, &command).unwrap();
        hosts.said(&mut hosts.agent(from, "checkpoint")).unwrap();
        let journal = hosts.host(from).data().join("journal");
        let grown = |more: u64| fs::metadata(&journal).unwrap().len() > more;
        let before = fs::metadata(&journal).unwrap().len();
        until("the program to write", SOON, || grown(before + 2_000).then_some(())).unwrap();

        let told = hosts.said(hosts.agent(from, "switchover").args(["--to", &backup])).unwrap();
        assert!(told.contains("nothing is behind it"), "{told}");
        assert_eq!(hosts.ended(from).unwrap(), ENDED_BY_TERM);
        let mut promote = if to == "b" {
            hosts.replayer("b", "promote")
        } else {
            if round == 1 {
                hosts.pair("a", "b", &["--group", &hosts.group, "--may", "write,read,administrate"]).unwrap();
            }
            let mut promote = hosts.a.command(binary("bfs-replayer"));
            promote.args(["promote", "--group", &hosts.group, "--connect", &hosts.b.destination(), "--keys"]);
            promote.arg(hosts.a.own.join("keys"));
            promote
        };
        let _ = fs::remove_dir_all(hosts.host(to).data());
        let told = hosts.said(promote.args(["--to", "/"])).unwrap();
        assert!(!told.contains("left out"), "{told}");
        equal(&hosts.host(from).data(), &hosts.host(to).data(), &format!("switchover {round} to {to}"));
        let text = fs::read_to_string(hosts.host(to).data().join("journal")).unwrap();
        let now = text.lines().count();
        assert!(text.lines().enumerate().all(|(at, line)| line == (at + 1).to_string()), "a line is lost");
        assert!(now > lines, "{now} lines after {lines}");
        lines = now;
    }
    println!("{lines} lines, none lost");
    // Whoever was primary is fenced, also when it is started again with what it has.
    let last = if rounds(6, 20).is_multiple_of(2) { "b" } else { "a" };
    let backup = match last {
        "a" => hosts.b.destination(),
        _ => format!("unix:{}", hosts.b.store().join("replayer.sock").display()),
    };
    let command = counting(&hosts, last);
    let refused = hosts.run(last, &backup, &command).unwrap_err().to_string();
    assert!(refused.contains("FENCED"), "{refused}");
}

/// A program that does not end: nothing has changed, and it is followed as before. Then it is rolled back on the new primary
/// to what it was on the old one.
#[test]
fn a_switchover_that_does_not_come_about_changes_nothing() {
    let (mut hosts, mut kept) = begin("switch-not");
    fs::write(hosts.a.data().join("sub/table"), "later").unwrap();
    let later = kept.take(&hosts, "a");
    let destination = hosts.b.destination();
    let other = hosts.output(hosts.agent("a", "switchover").args(["--to", "tcp://10.77.0.9:1"])).unwrap();
    assert_eq!(other.status.code(), Some(64), "{}", String::from_utf8_lossy(&other.stderr));
    let mut waits = hosts.agent("a", "switchover");
    let waited = hosts.output(waits.args(["--to", &destination, "--wait", "--timeout", "1s"])).unwrap();
    let said = String::from_utf8_lossy(&waited.stderr).into_owned();
    assert!(waited.status.code() == Some(74) && said.contains("did not end"), "{said}");
    fs::write(hosts.a.data().join("still"), "followed").unwrap();
    kept.take(&hosts, "a");
    hosts.b.wire(false).unwrap();
    let away = until("the agent to see that", SOON, || {
        let status = hosts.status("a").ok()?;
        (status["destinations"][0]["connected"] == false)
            .then(|| hosts.output(hosts.agent("a", "switchover").args(["--to", &destination])).unwrap())
    })
    .unwrap();
    let said = String::from_utf8_lossy(&away.stderr).into_owned();
    assert!(!away.status.success() && said.contains("left alone"), "{said}");
    hosts.b.wire(true).unwrap();
    until("the wire to be mended", SOON, || {
        hosts.status("a").ok().filter(|status| status["destinations"][0]["connected"] == true)
    })
    .unwrap();
    hosts.said(hosts.agent("a", "switchover").args(["--to", &destination])).unwrap();
    assert_eq!(hosts.ended("a").unwrap(), 143);
    promote(&hosts, "b", &[]);
    run_on_b(&mut hosts);
    fs::write(hosts.b.data().join("sub/table"), "on b").unwrap();
    fs::remove_file(hosts.b.data().join("one")).unwrap();
    kept.take(&hosts, "b");
    assert_eq!(hosts.finish("b").unwrap(), 0);
    // What the old primary had, on the new one.
    let mut back = hosts.agent("b", "rollback");
    back.args(["--to", &later.to_string(), "--path"]).arg(&hosts.b.place.data).arg("--keys");
    back.arg(hosts.b.own.join("keys")).arg("--spool").arg(hosts.b.own.join("spool")).arg("--backup");
    hosts.said(back.arg(format!("unix:{}", hosts.b.store().join("replayer.sock").display()))).unwrap();
    let then = &kept.0.iter().find(|(number, _)| *number == later).unwrap().1;
    equal(then, &hosts.b.data(), "brought back on the new primary");
    kept.all_equal(&hosts, "b", "after going back");
}

/// A program on a host that appends a line to `w` and to `x.c` whenever it is told, and its agent, with these policies.
fn appending(hosts: &mut Hosts, name: &str, backup: &str, policies: &[&str]) {
    let host = hosts.host(name);
    for mark in ["ready", "stop"] {
        let _ = fs::remove_file(host.place.aux.join(mark));
    }
    let script = "touch \"$2/ready\"; while [ ! -e \"$2/stop\" ]; do
        if [ -e \"$2/go\" ]; then line=$(cat \"$2/go\"); echo \"$line\" >> \"$1/w\"; echo \"$line\" >> \"$1/x.c\"; rm \"$2/go\"; fi
        sleep 0.02; done";
    let mut agent = hosts.agent(name, "run");
    agent.args(["--checkpoint", "manual", "--backup", backup, "--path"]).arg(&host.place.data);
    for (option, folder) in [("--keys", "keys"), ("--spool", "spool"), ("--policies", "policies")] {
        agent.arg(option).arg(host.own.join(folder));
    }
    for policy in policies {
        agent.args(["--policy", &policy.replace("DATA", &host.place.data.display().to_string())]);
    }
    agent.args(["--", "sh", "-c", script, "sh"]).arg(&host.place.data).arg(&host.place.aux);
    let ready = host.place.aux.join("ready");
    hosts.start(name, agent).unwrap();
    until("the program", SOON, || ready.exists().then_some(())).unwrap();
}

/// Has it append a line.
fn append(hosts: &Hosts, name: &str, line: &str) {
    let aux = &hosts.host(name).place.aux;
    fs::write(aux.join("line"), line).unwrap();
    fs::rename(aux.join("line"), aux.join("go")).unwrap();
    until("the program to append", SOON, || (!aux.join("go").exists()).then_some(())).unwrap();
}

/// Followers are ahead of the tree. What they showed of the primary that is gone, and no checkpoint had, goes when the promoted host
/// writes; then they follow its files, also over a kill of the replayer, and go when its policies name them no more.
#[test]
fn followers_follow_the_host_that_was_promoted() {
    const POLICIES: [&str; 2] = ["DATA/w:backup=write", "*.c:backup=close"];
    let mut hosts = Hosts::new("promote-followers").unwrap();
    fs::write(hosts.a.data().join("w"), "first\n").unwrap();
    fs::write(hosts.a.data().join("x.c"), "first\n").unwrap();
    hosts.serve("b").unwrap();
    hosts.pair("a", "b", &[]).unwrap();
    let to = hosts.b.destination();
    appending(&mut hosts, "a", &to, &POLICIES);
    let mut kept = Kept(Vec::new());
    let last = kept.take(&hosts, "a");
    let now = hosts.b.store().join("now").join(&hosts.group);
    let below = now.join(hosts.a.place.data.strip_prefix("/").unwrap());
    let shows = |name: &str, text: &str| {
        let read = || fs::read_to_string(below.join(name)).unwrap_or_default();
        until(&format!("the follower of {name} to show {text:?}"), SOON, || (read() == text).then_some(()))
            .unwrap_or_else(|e| panic!("{e}: it shows {:?}", read()));
    };
    shows("w", "first\n");
    append(&hosts, "a", "pending");
    shows("w", "first\npending\n");
    shows("x.c", "first\npending\n");
    let in_tree = hosts.b.store().join(tree(&hosts));
    equal(kept.newest(), &in_tree, "the tree waits for a checkpoint");

    let said = promote(&hosts, "b", &["--force"]);
    assert!(said.contains(&format!("checkpoint {last} (")) && said.contains("left out: "), "{said}");
    equal(kept.newest(), &hosts.b.data(), "what was given out");
    let socket = format!("unix:{}", hosts.b.store().join("replayer.sock").display());
    appending(&mut hosts, "b", &socket, &POLICIES);
    kept.take(&hosts, "b");
    // What was pending on the host before is nowhere any more.
    shows("w", "first\n");
    shows("x.c", "first\n");
    append(&hosts, "b", "on b");
    shows("w", "first\non b\n");
    shows("x.c", "first\non b\n");
    equal(kept.newest(), &in_tree, "the tree waits for a checkpoint of the new primary");
    hosts.kill_replayer("b").unwrap();
    append(&hosts, "b", "meanwhile");
    hosts.serve("b").unwrap();
    shows("w", "first\non b\nmeanwhile\n");
    shows("x.c", "first\non b\nmeanwhile\n");
    kept.take(&hosts, "b");
    equal(&hosts.b.data(), &in_tree, "with the checkpoint");
    kept.all_equal(&hosts, "b", "on the promoted host");
    assert_eq!(hosts.finish("b").unwrap(), 0);

    appending(&mut hosts, "b", &socket, &[]);
    kept.take(&hosts, "b");
    until("the followers to go", SOON, || {
        ["w", "x.c"].iter().all(|name| !below.join(name).exists()).then_some(())
    })
    .unwrap();
    assert_eq!(hosts.finish("b").unwrap(), 0);
    until("the old primary to be fenced", SOON, || {
        hosts.status("a").ok().filter(|status| status["state"] == "Fenced" || status["state"] == "fenced")
    })
    .unwrap();
    assert_eq!(hosts.finish("a").unwrap(), FENCED);
}
