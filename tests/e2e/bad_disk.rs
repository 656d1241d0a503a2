//! A disk that loses bytes: files with the recovery `automatic` come back by themselves when a selected process sees the
//! error, in place, and those with `request` when a program asks. What cannot be brought back is told.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use bfs_tests::bad_disk::{BLOCK, BadDisk};
use bfs_tests::exercise;
use bfs_tests::programs::puppet::Puppet;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, rounds};
use serde_json::Value;

/// A file did not come back: `bfs-agent --help`.
const NOT_RECOVERED: i32 = 78;
/// Pages of a file, and what the last one has.
const PAGES: u64 = 40;
const TAIL: u64 = 100;

/// What a page has.
fn page(number: u64) -> Vec<u8> {
    format!("{number:07} ").repeat(BLOCK as usize / 8).into_bytes()
}

/// The file with these pages, and its size.
fn content() -> Vec<u8> {
    let mut all: Vec<u8> = (0..PAGES).flat_map(page).collect();
    all.extend_from_slice(&page(PAGES)[..TAIL as usize]);
    all
}

/// Where a file stands whose disk can fail.
struct Bad {
    world: World,
    disk: BadDisk,
    puppet: Puppet,
    path: PathBuf,
    file: File,
}

/// A program that does what it is told, with the file `table` of many pages, which has `other` for a second name.
fn start(name: &str, policy: &str) -> Bad {
    let mut world = World::new(name, Transport::Unix).unwrap();
    let disk = world.mount_bad_disk(64).unwrap();
    let path = world.place.data.join("table");
    fs::write(&path, content()).unwrap();
    fs::hard_link(&path, world.place.data.join("other")).unwrap();
    world.agent_options(&["--policy", &format!("{}:{policy}", path.display())]);
    world.start_replayer().unwrap();
    let (command, listener) = Puppet::prepare(&world.place).unwrap();
    world.run(&command).unwrap();
    let mut puppet = Puppet::new(&listener).unwrap();
    puppet.does("open 1 table").unwrap();
    world.checkpoint_until("applied").unwrap();
    let file = File::open(&path).unwrap();
    Bad { world, disk, puppet, path, file }
}

impl Bad {
    fn recovery(&self) -> Value {
        self.world.status().unwrap()["recovery"].clone()
    }

    fn comes_back(&self, times: u64) {
        let back = || (self.recovery()["recovered"] == times).then_some(());
        until("the file to come back", SOON, back).unwrap_or_else(|e| panic!("{e}: {}", self.recovery()));
    }

    /// What the program sees of a page.
    fn reads(&mut self, number: u64) -> anyhow::Result<()> {
        let text = String::from_utf8(page(number)).unwrap();
        self.puppet.does(&format!("read 1 {} {}", number * BLOCK, text.trim_end()))
    }

    /// It ends, and the backup is equal.
    fn ends(mut self) -> Option<i32> {
        self.puppet.does("end").unwrap_err();
        let status = self.world.finish().unwrap();
        exercise::equal(&self.world).unwrap();
        status.code()
    }
}

fn fails_with_eio(result: anyhow::Result<()>) {
    let said = result.unwrap_err().to_string();
    assert!(said.contains("os error 5"), "{said}");
}

/// The program reads what its disk lost: that is told to it, as it is without us, and then it is there again, for whoever has
/// the file open, by every name, with the time that it had.
#[test]
fn what_cannot_be_read_comes_back_where_it_stands() {
    let mut bad = start("bad-disk", "recovery=automatic");
    let before = bad.file.metadata().unwrap();
    for (times, lost) in [vec![3], vec![7, 8, 20], vec![PAGES]].into_iter().enumerate() {
        for number in &lost {
            bad.disk.lose(&bad.file, number * BLOCK).unwrap();
        }
        let first = lost[0];
        let text = if first == PAGES { &page(PAGES)[..TAIL as usize] } else { &page(first)[..] };
        let text = String::from_utf8(text.to_vec()).unwrap();
        let read = format!("read 1 {} {}", first * BLOCK, text.trim_end());
        fails_with_eio(bad.puppet.does(&read));
        bad.comes_back(times as u64 + 1);
        bad.puppet.does(&read).unwrap();
        assert_eq!(fs::read(&bad.path).unwrap(), content(), "{lost:?}");
        assert_eq!(bad.disk.unreadable(), 0, "it was written where it is lost");
    }
    let after = bad.file.metadata().unwrap();
    let of = |meta: &fs::Metadata| (meta.ino(), meta.nlink(), meta.len(), meta.mtime(), meta.mtime_nsec());
    assert_eq!(of(&before), of(&after), "it is the same file");
    assert_eq!(fs::metadata(bad.world.place.data.join("other")).unwrap().ino(), after.ino());
    // Nothing of that made another file of it for the backup.
    bad.world.checkpoint_until("applied").unwrap();
    exercise::equal(&bad.world).unwrap();
    let file = &bad.file;
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert_eq!(fs::read(&bad.path).unwrap(), content(), "and stands on the disk");
    assert_eq!(bad.ends(), Some(0));
}

/// What no checkpoint has yet comes back, too.
#[test]
fn what_was_captured_since_the_checkpoint_counts() {
    let mut bad = start("bad-disk-newest", "recovery=automatic");
    bad.puppet.does("seek 1 8200").unwrap();
    bad.puppet.does("write 1 newer").unwrap();
    bad.puppet.does("sync 1").unwrap();
    bad.disk.lose(&bad.file, 2 * BLOCK).unwrap();
    fails_with_eio(bad.puppet.does("read 1 8200 newer"));
    bad.comes_back(1);
    bad.puppet.does("read 1 8200 newer").unwrap();
    let mut expected = content();
    expected[8200..8205].copy_from_slice(b"newer");
    assert_eq!(fs::read(&bad.path).unwrap(), expected);
    bad.world.checkpoint_until("applied").unwrap();
    assert_eq!(bad.ends(), Some(0));
}

/// A sync fails, and what was to be synced would count as clean from then on: it is written again, and tried again while the
/// disk does not take it.
#[test]
fn what_a_failed_sync_left_is_written_again() {
    let mut bad = start("bad-disk-sync", "recovery=automatic,retries=50,time_limit=20s");
    bad.disk.refuse_writes(&bad.file, 4 * BLOCK).unwrap();
    bad.puppet.does(&format!("seek 1 {}", 4 * BLOCK)).unwrap();
    bad.puppet.does("write 1 synced").unwrap();
    fails_with_eio(bad.puppet.does("sync 1"));
    let going = || (bad.recovery()["waiting"] == 1).then_some(());
    until("the recovery to begin", SOON, going).unwrap();
    bad.disk.accept_writes();
    bad.comes_back(1);
    rustix::fs::fadvise(&bad.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut expected = content();
    expected[4 * BLOCK as usize..][..6].copy_from_slice(b"synced");
    assert_eq!(fs::read(&bad.path).unwrap(), expected, "the disk has it");
    bad.world.checkpoint_until("applied").unwrap();
    assert_eq!(bad.ends(), Some(0));
}

/// A disk that keeps nothing: after the tries it is told, with entry, action and reason, everywhere; and files without such a
/// policy are left alone.
#[test]
fn what_does_not_come_back_is_told() {
    let mut bad = start("bad-disk-limits", "recovery=automatic,retries=2,time_limit=10s");
    let manual = bad.world.place.data.join("manual");
    bad.puppet.does("open 2 manual").unwrap();
    bad.puppet.does("write 2 manual").unwrap();
    bad.disk.lasting(true);
    let file = File::open(&manual).unwrap();
    bad.world.checkpoint_until("applied").unwrap();
    bad.disk.lose(&file, 0).unwrap();
    bad.disk.lose(&bad.file, 5 * BLOCK).unwrap();
    fails_with_eio(bad.puppet.does("read 2 0 manual"));
    fails_with_eio(bad.reads(5));
    let failed = || (bad.recovery()["failures"] == 1).then(|| bad.recovery());
    let told = until("the failure", SOON, failed).unwrap();
    let trouble = told["troubles"][0].as_str().unwrap().to_owned();
    for part in [
        "policy",
        "table",
        "recovery of",
        "in place",
        "2 names",
        "tried 3 times",
        "system call",
        "os error 5",
    ] {
        assert!(trouble.contains(part), "{part}: {trouble}");
    }
    assert_eq!(told["recovered"], 0);
    let shown = bad.world.agent_command(&["status"], SOON).unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("recovery of"), "{shown:?}");
    // It does not keep checkpoints of what is there from coming.
    bad.puppet.does("open 3 more").unwrap();
    bad.puppet.does("write 3 more").unwrap();
    bad.world.checkpoint_until("applied").unwrap();
    // Whoever looks at the exit status sees it.
    bad.puppet.does("end").unwrap_err();
    assert_eq!(bad.world.finish().unwrap().code(), Some(NOT_RECOVERED));
}

/// The disk takes nothing in that place: another file is made of it, if nobody has this one open and it has no other name.
#[test]
fn another_file_comes_where_the_disk_does_not_take_it() {
    let mut bad = start("bad-disk-elsewhere", "recovery=automatic,retries=1");
    let block = BadDisk::block_of(&bad.file, 5 * BLOCK).unwrap();
    fs::remove_file(bad.world.place.data.join("other")).unwrap();
    bad.world.checkpoint_until("applied").unwrap();
    bad.disk.lasting(true);
    bad.disk.lose(&bad.file, 5 * BLOCK).unwrap();
    let before = fs::metadata(&bad.path).unwrap();
    bad.file = File::open("/dev/null").unwrap();
    // It opens, sees that, and has closed it before anything is tried.
    let head = format!("dd if={} of=/dev/null bs=4096 status=none", bad.path.display());
    bad.puppet.does("close 1").unwrap();
    bad.puppet.does(&format!("shell {head}")).unwrap_err();
    bad.comes_back(1);
    let after = fs::metadata(&bad.path).unwrap();
    assert_ne!(before.ino(), after.ino(), "it is another file");
    let of = |meta: &fs::Metadata| (meta.mode(), meta.len(), meta.mtime(), meta.mtime_nsec());
    assert_eq!(of(&before), of(&after));
    assert_eq!(fs::read(&bad.path).unwrap(), content());
    assert_ne!(BadDisk::block_of(&File::open(&bad.path).unwrap(), 5 * BLOCK).unwrap(), block);
    bad.world.checkpoint_until("applied").unwrap();
    assert_eq!(bad.ends(), Some(0));
}

/// The backup is away: the time of the policy passes, and that is told; when it is there again, the file comes back with the
/// next error.
#[test]
fn without_the_backup_the_time_passes() {
    let mut bad = start("bad-disk-away", "recovery=automatic,retries=1,time_limit=300ms");
    bad.world.pause_replayer(true).unwrap();
    bad.disk.lose(&bad.file, 5 * BLOCK).unwrap();
    fails_with_eio(bad.reads(5));
    let failed = || (bad.recovery()["failures"] == 1).then(|| bad.recovery());
    let told = until("the failure", SOON, failed).unwrap();
    let trouble = told["troubles"][0].as_str().unwrap();
    assert!(trouble.contains("time limit") && trouble.contains("tried 2 times"), "{trouble}");
    bad.world.pause_replayer(false).unwrap();
    let path = bad.path.display().to_string();
    let asked = bad.world.agent_command(&["recover", "--at", "newest", &path], SOON).unwrap();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    bad.reads(5).unwrap();
    assert!(bad.recovery()["troubles"].as_array().unwrap().is_empty(), "it is over");
    bad.world.checkpoint_until("applied").unwrap();
    assert_eq!(bad.ends(), Some(0));
}

/// A disk that gives other bytes without an error: a program that notices asks, and gets what was captured last, with size and
/// attributes. What no policy allows is refused.
#[test]
fn what_is_asked_for_is_written_over() {
    let mut bad = start("bad-disk-request", "recovery=request");
    bad.disk.spoil(&bad.file, 9 * BLOCK + 5, b"spoiled").unwrap();
    bad.disk.lose(&bad.file, 30 * BLOCK).unwrap();
    // Nothing comes by itself.
    fails_with_eio(bad.reads(30));
    assert!(bad.reads(9).is_err());
    let path = bad.path.display().to_string();
    let asked = bad.world.agent_command(&["recover", "--at", "newest", &path], SOON).unwrap();
    let said = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    assert!(said.contains(&format!("{} bytes", PAGES * BLOCK + TAIL)), "{said}");
    assert!(said.contains("8192 written"), "{said}");
    bad.reads(30).unwrap();
    bad.reads(9).unwrap();
    assert_eq!(fs::read(&bad.path).unwrap(), content());
    let other = bad.world.place.data.join("free");
    bad.puppet.does("open 2 free").unwrap();
    let refused =
        bad.world.agent_command(&["recover", "--at", "newest", &other.display().to_string()], SOON).unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no policy says"), "{refused:?}");
    bad.world.checkpoint_until("applied").unwrap();
    assert_eq!(bad.ends(), Some(0));
}

/// The program goes on writing to the file, and others append to it, while pages of it come back again and again: no byte of
/// theirs is written over.
#[test]
fn what_is_written_meanwhile_stays() {
    let mut bad = start("bad-disk-meanwhile", "recovery=automatic,retries=20");
    let mut expected = content();
    let writer = File::options().write(true).open(&bad.path).unwrap();
    for round in 0..10u64 {
        let lost = 11 + round;
        bad.disk.lose(&bad.file, lost * BLOCK).unwrap();
        fails_with_eio(bad.reads(lost));
        for n in 0..20u64 {
            let (at, text) = ((n % 10) * BLOCK + 16, format!("{round:03} {n:03}"));
            bad.puppet.does(&format!("seek 1 {at}")).unwrap();
            bad.puppet.does(&format!("write 1 {text}")).unwrap();
            expected[at as usize..][..7].copy_from_slice(text.as_bytes());
        }
        let line = format!("appended {round}\n");
        writer.write_all_at(line.as_bytes(), expected.len() as u64).unwrap();
        expected.extend_from_slice(line.as_bytes());
        bad.comes_back(round + 1);
        assert!(fs::read(&bad.path).unwrap() == expected, "round {round}");
        if round % 3 == 2 {
            bad.world.checkpoint_until("applied").unwrap();
            exercise::equal(&bad.world).unwrap();
        }
    }
    assert_eq!(bad.ends(), Some(0));
}

/// The agent dies at some moment of it. Whatever can be read then has the right bytes; the next agent knows of the errors that the
/// one before was told of, also of a sync, and brings back what is missing, without another sign.
#[test]
fn an_agent_that_dies_in_the_middle_leaves_the_rest_to_the_next() {
    let mut bad = start("bad-disk-killed", "recovery=automatic,retries=50,time_limit=60s");
    let seed = given_seed().unwrap_or(20_261_128);
    eprintln!("BFS_SEED={seed}");
    let mut moments = Random::new(seed);
    let mut expected = content();
    let (mut whole, mut broken) = (0, 0);
    for round in 0..rounds(10, 200) as u64 {
        let lost = [1, 5, 11].map(|n| 10 + (round * 7 + n) % (PAGES - 10));
        for number in lost {
            bad.disk.lose(&bad.file, number * BLOCK).unwrap();
        }
        if round % 3 == 2 {
            // A sync that fails, of bytes that no checkpoint has.
            bad.disk.refuse_writes(&bad.file, 4 * BLOCK).unwrap();
            let text = format!("round {round:04}");
            bad.puppet.does(&format!("seek 1 {}", 4 * BLOCK)).unwrap();
            bad.puppet.does(&format!("write 1 {text}")).unwrap();
            expected[4 * BLOCK as usize..][..text.len()].copy_from_slice(text.as_bytes());
            fails_with_eio(bad.puppet.does("sync 1"));
            bad.disk.accept_writes();
        } else {
            fails_with_eio(bad.reads(lost[0]));
        }
        // The moment of the kill is what is tested.
        std::thread::sleep(Duration::from_micros(moments.below(80_000) as u64));
        bad.world.kill_agent().unwrap();
        let mut unreadable = 0;
        for number in 0..PAGES {
            let mut bytes = vec![0; BLOCK as usize];
            let range = (number * BLOCK) as usize..((number + 1) * BLOCK) as usize;
            match bad.file.read_exact_at(&mut bytes, number * BLOCK) {
                Ok(()) => assert!(bytes == expected[range], "round {round}, page {number}"),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => unreadable += 1,
                Err(error) => panic!("{error}"),
            }
        }
        *if unreadable == 0 { &mut whole } else { &mut broken } += 1;
        bad.world.resume().unwrap();
        until("the file to come back", SOON, || (fs::read(&bad.path).ok()? == expected).then_some(()))
            .unwrap_or_else(|e| panic!("round {round}: {e}: {}", bad.recovery()));
        until("the recovery to end", SOON, || (bad.recovery()["waiting"] == 0).then_some(())).unwrap();
        // Each descriptor is told once of a write-back that failed.
        let _ = bad.file.sync_all();
        rustix::fs::fadvise(&bad.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(fs::read(&bad.path).unwrap() == expected, "round {round}: the disk has it");
        bad.world.checkpoint_until("applied").unwrap();
        exercise::equal(&bad.world).unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
    println!("{whole} were whole when the agent died, {broken} were not");
    assert_eq!(bad.ends(), Some(0));
}
