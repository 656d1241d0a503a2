//! What goes wrong with process state: the agent dies in a dump and behind it, disks are full, CRIU cannot dump, or takes
//! too long. The files are safe each time, and the program goes on.

use std::fs;
use std::io::Write;
use std::time::Duration;

use bfs_tests::processes::{
    STANDS, begin_rollback, counted_loosely, criu, criu_that, ends_right, images, is_right, kill, on_backup,
    progress, rollback, start, started, started_by, stopped,
};
use bfs_tests::random::Random;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, rounds};

/// A checkpoint was given up: `bfs-agent --help`.
const GIVEN_UP: i32 = 73;

/// Once the mark `hold` is there, nothing is restored, after it is gone.
const STANDS_AND_FAILS: &str = "\
if [ -e $folder/hold ]; then
    touch $folder/held
    while [ -e $folder/hold ]; do sleep 0.02; done
    exit 1
fi";

fn check_backup(world: &mut World) {
    world.kill_replayer().unwrap();
    let done = world.of_replayer(&["check", "--read-data"]).unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// CRIU finds the cgroup frozen and leaves it so when it ends: long after the agent's guard has thawed it.
#[test]
fn the_program_goes_on_when_the_agent_dies_in_a_dump() {
    let mut world = World::new("process-dies", Transport::Unix).unwrap();
    let criu = criu_that(&world.scratch, "dump", STANDS);
    start(&mut world, criu.to_str().unwrap(), "counter.py", &[]);
    until("a dump", SOON, || (images(&world).0 > 1).then_some(())).unwrap();
    let (hold, held) = (world.scratch.join("hold"), world.scratch.join("held"));
    fs::write(&hold, "").unwrap();
    until("a dump half way", SOON, || held.exists().then_some(())).unwrap();
    let folder = world.root().join("images").join(&world.group);
    let numbers = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let dumped = numbers.filter_map(|name| name.to_str()?.parse::<u64>().ok()).max().unwrap();
    world.kill_agent().unwrap();
    // CRIU holds it still, or the guard has thawed it already.
    std::thread::sleep(Duration::from_millis(200));
    fs::remove_file(&hold).unwrap();
    progress(&world);
    assert!(world.program_runs());
    world.resume().unwrap();
    world.checkpoint().unwrap();
    let all = on_backup(&world);
    assert!(all.iter().all(|(at, bytes)| bytes.is_none() || *at <= dumped), "after {dumped}: {all:?}");
    ends_right(&mut world);
    check_backup(&mut world);
}

/// Whether CRIU works for this world.
fn criu_works(world: &World) -> bool {
    let images = world.root().join("images").display().to_string();
    let of = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
    let lines = fs::read_dir("/proc").unwrap().flatten().map(of);
    let mut lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    lines.any(|line| line.contains("--images-dir") && line.contains(&images))
}

/// While processes are ended, files are brought back, or CRIU restores: either the program goes on, with memory and files of
/// one instant, or nobody runs, on files of one instant; the backup gets what there is.
#[test]
fn the_agent_may_die_at_any_moment_of_a_going_back() {
    let mut random = Random::printed();
    let (mut went_on, mut went_back) = (0, 0);
    let all = rounds(6, 100);
    for round in 0..all {
        let mut world = started("process-back", "counter.py", &[]);
        until("a dump", SOON, || (images(&world).0 > 1).then_some(())).unwrap();
        let had = counted_loosely(&world);
        let mut asks = begin_rollback(&world);
        std::thread::sleep(Duration::from_millis(random.below(500) as u64));
        world.kill_agent().unwrap();
        asks.wait().unwrap();
        until("CRIU to end", SOON, || (!criu_works(&world)).then_some(())).unwrap();
        let runs = world.program_runs();
        println!("{round}: killed at about {had}; the program runs: {runs}");
        if runs {
            went_on += 1;
            world.resume().unwrap();
            progress(&world);
            world.checkpoint().unwrap();
            assert!(world.finish().unwrap().success(), "the program found itself wrong");
        } else {
            went_back += 1;
            // It ends by itself: nobody is left.
            let done = world.agent_command(&["resume"], SOON).unwrap();
            assert!(done.status.success(), "{done:?}");
        }
        is_right(&world);
        check_backup(&mut world);
    }
    println!("{went_on} times the program went on, {went_back} times nobody ran");
    assert_eq!(went_on + went_back, all);
}

/// No probe has seen what the agent changed itself.
#[test]
fn files_that_were_brought_back_by_who_died_are_read_by_the_successor() {
    let mut world = World::new("process-read", Transport::Unix).unwrap();
    let criu = criu_that(&world.scratch, "restore", STANDS_AND_FAILS);
    start(&mut world, criu.to_str().unwrap(), "counter.py", &[]);
    until("dumps", SOON, || (images(&world).0 > 1).then_some(())).unwrap();
    let (hold, held) = (world.scratch.join("hold"), world.scratch.join("held"));
    fs::write(&hold, "").unwrap();
    let mut asks = begin_rollback(&world);
    until("the files to be back", SOON, || held.exists().then_some(())).unwrap();
    world.kill_agent().unwrap();
    fs::remove_file(&hold).unwrap();
    asks.wait().unwrap();
    until("CRIU to end", SOON, || (!criu_works(&world)).then_some(())).unwrap();
    assert!(!world.program_runs());
    // It ends by itself: nobody is left.
    let done = world.agent_command(&["resume"], SOON).unwrap();
    assert!(done.status.success(), "{done:?}");
    is_right(&world);
    check_backup(&mut world);
}

#[test]
fn what_was_not_brought_when_the_agent_dies_is_not_there() {
    let mut world = started("process-behind", "counter.py", &[]);
    let shipped = |world: &World| world.status().unwrap()["process"]["shipped"].as_u64();
    until("process state on the backup", SOON, || shipped(&world)).unwrap();
    world.pause_replayer(true).unwrap();
    let before = images(&world).0;
    until("dumps", SOON, || (images(&world).0 > before + 1).then_some(())).unwrap();
    let last = shipped(&world).unwrap();
    world.kill_agent().unwrap();
    world.pause_replayer(false).unwrap();
    progress(&world);
    world.resume().unwrap();
    let taken = world.checkpoint().unwrap();
    let all = on_backup(&world);
    let newest = all.iter().rev().find(|(_, bytes)| bytes.is_some()).unwrap().0;
    // One that was on its way may have come.
    assert!(newest >= last && newest < taken, "{newest} of {all:?}");
    ends_right(&mut world);
    check_backup(&mut world);
}

/// Neither does a dump fill the disk that others need, nor is a dump that finds it full more than that.
#[test]
fn a_full_disk_on_the_primary_costs_process_state_only() {
    let mut world = World::new("process-full", Transport::Unix).unwrap();
    world.mount_images(96).unwrap();
    start(&mut world, &criu(), "elsewhere.py", &["--process-keep", "1"]);
    let folder = world.root().join("images");
    until("a dump", SOON, || (images(&world).0 > 0).then_some(())).unwrap();
    let why = |world: &World| world.status().unwrap()["process"]["failure"].to_string();

    let filler = folder.join("filler");
    fs::write(&filler, vec![b'x'; 70 << 20]).unwrap();
    let before = images(&world);
    until("dumps for which is no room", SOON, || (images(&world).1 > before.1 + 1).then_some(())).unwrap();
    assert!(why(&world).contains("no room for process images"), "{}", why(&world));
    stopped(&world);
    fs::remove_file(&filler).unwrap();
    let before = images(&world);
    until("dumps again", SOON, || (images(&world).0 > before.0 + 1).then_some(())).unwrap();

    // What a file without a name has goes into the images too, and cannot be told before.
    fs::write(&filler, vec![b'x'; 30 << 20]).unwrap();
    fs::write(world.place.aux.join("fill"), "").unwrap();
    let before = images(&world);
    until("dumps that find it full", SOON, || (images(&world).1 > before.1 + 1).then_some(())).unwrap();
    println!("{}", why(&world));
    assert!(why(&world).contains("CRIU cannot dump it"), "{}", why(&world));
    progress(&world);
    stopped(&world);
    fs::write(world.place.aux.join("empty"), "").unwrap();
    fs::remove_file(&filler).unwrap();
    let before = images(&world);
    until("dumps again", SOON, || (images(&world).0 > before.0 + 1).then_some(())).unwrap();

    ends_right(&mut world);
}

#[test]
fn a_full_disk_on_the_backup_costs_no_file() {
    let mut world = World::new("process-full-backup", Transport::Unix).unwrap();
    world.store_apart(192).unwrap();
    start(&mut world, &criu(), "counter.py", &[]);
    let process = |world: &World, name: &str| world.status().unwrap()["process"][name].clone();
    let shipped = |world: &World| process(world, "shipped").as_u64().unwrap_or(0);
    until("process state on the backup", SOON, || (shipped(&world) > 0).then_some(())).unwrap();
    // Neither records nor images find room: the files wait in the spool, images of checkpoints in between are passed by.
    let filler = world.store.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    let free = || rustix::fs::statvfs(&world.store).map(|space| space.f_bavail * space.f_frsize).unwrap();
    let refused = until("a full disk", SOON, || {
        while free() > 8 << 20 {
            file.write_all(&vec![b'x'; 1 << 20]).unwrap();
        }
        world.status().ok()?["process"]["ship_failure"].as_str().map(str::to_owned)
    });
    let refused = refused.unwrap();
    assert!(refused.contains("full") || refused.contains("not confirmed yet"), "{refused}");
    println!("{refused}");
    progress(&world);
    drop(file);
    fs::remove_file(&filler).unwrap();
    let before = shipped(&world);
    until("process state on the backup again", SOON, || (shipped(&world) > before).then_some(())).unwrap();
    assert!(process(&world, "ship_failure").is_null());
    ends_right(&mut world);
    check_backup(&mut world);
}

/// `--process-failure refuse`: rather no checkpoint than one without processes.
#[test]
fn without_process_state_there_is_no_checkpoint_if_it_is_wanted_so() {
    let mut world = started("process-refuse", "connected.py", &["--process-failure", "refuse"]);
    until("dumps that fail", SOON, || (images(&world).1 > 1).then_some(())).unwrap();
    let done = world.agent_command(&["checkpoint"], SOON).unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(GIVEN_UP), "{said}");
    assert!(said.contains("--process-failure refuse") && said.contains("sockets"), "{said}");
    // Only before it had the connection, if at all.
    let status = world.status().unwrap();
    assert_eq!(status["checkpoints_taken"], status["process"]["dumped"], "{status}");
    let before = images(&world).0;
    let said = world.agent_command(&["status"], SOON).unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("--process-failure refuse"), "{said}");
    progress(&world);
    // When the cause is gone they come, each with its processes.
    fs::write(world.place.aux.join("alone"), "").unwrap();
    until("a dump", SOON, || (images(&world).0 > before).then_some(())).unwrap();
    let failed = images(&world).1;
    for _ in 0..3 {
        let taken = world.checkpoint().unwrap();
        let kept = world.status().unwrap()["process"]["kept"].clone();
        assert!(kept.as_array().unwrap().iter().any(|at| at.as_u64() >= Some(taken)), "{taken} {kept}");
    }
    assert_eq!(images(&world).1, failed);
    ends_right(&mut world);
}

/// Where a dump takes longer than the interval, checkpoints are further apart, or have files only now and then.
#[test]
fn a_dump_that_takes_too_long_stretches_the_interval_or_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let slow = criu_that(folder.path(), "dump", "sleep 0.5");
    let slow = slow.to_str().unwrap();
    let numbers = |world: &World| {
        let status = world.status().unwrap();
        let number = |name: &str| status["process"][name].as_u64().unwrap();
        (status["checkpoints_taken"].as_u64().unwrap(), number("dumped"), number("skipped"))
    };
    let run = |name: &str, more: &[&str]| {
        let mut world = started_by(slow, name, "counter.py", more);
        let begun = std::time::Instant::now();
        until("dumps", SOON, || (numbers(&world).1 > 3).then_some(())).unwrap();
        let all = numbers(&world);
        println!("{name}: {all:?} in {:?}", begun.elapsed());
        assert_eq!(images(&world).1, 0);
        kill_and_finish(&mut world);
        all
    };
    let (taken, dumped, skipped) = run("process-stretch", &["--restart-on-abort", "1"]);
    assert_eq!((taken, skipped), (dumped, 0));
    let (taken, dumped, skipped) =
        run("process-skip", &["--restart-on-abort", "1", "--process-overrun", "skip"]);
    assert!(skipped > 0 && taken >= dumped + skipped, "{taken} {dumped} {skipped}");
}

fn kill_and_finish(world: &mut World) {
    kill(world, images(world).2);
    progress(world);
    ends_right(world);
}

/// What is open elsewhere is listed, of each checkpoint, with what becomes of it; and that becomes of it.
#[test]
fn what_is_open_elsewhere_is_told() {
    let mut world = started("process-elsewhere", "elsewhere.py", &["--process-keep", "50"]);
    until("dumps", SOON, || (images(&world).0 > 2).then_some(())).unwrap();
    let other = world.place.aux.join("other").display().to_string();
    let status = world.status().unwrap();
    let told = |list: &serde_json::Value| {
        let all = list.as_array().unwrap().clone();
        move |what: &str| {
            let one = all.iter().find(|one| one["what"] == what);
            one.map(|one| one["at_restore"].as_str().unwrap().to_owned())
        }
    };
    let all = told(&status["process"]["outside"]);
    assert!(all(&other).unwrap().contains("opened again by its path"), "{status}");
    assert_eq!(all("/dev/zero").unwrap(), "it is opened again");
    let log = world.logs().join("agent.log").display().to_string();
    assert!(all(&log).unwrap().contains("given to them again"), "{status}");
    let data = world.place.data.display().to_string();
    let inside = |what: &serde_json::Value| what["what"].as_str().unwrap().starts_with(&data);
    assert!(!status["process"]["outside"].as_array().unwrap().iter().any(inside), "{status}");
    let kept = status["process"]["kept_outside"].as_array().unwrap().clone();
    assert_eq!(kept.len(), status["process"]["kept"].as_array().unwrap().len());
    // The first ones may be of the time before it had that.
    for of in &kept[kept.len() - 2..] {
        assert!(told(&of[1])(&other).is_some(), "{of}");
    }
    let said = world.agent_command(&["status"], SOON).unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).contains("open elsewhere"), "{said:?}");

    let done = rollback(&world, &[]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && said.contains(&format!("open elsewhere: {other}: ")), "{said} {done:?}");
    progress(&world);

    // As it was said: where it has another size than then, they cannot be restored.
    let before = images(&world).0;
    until("a dump", SOON, || (images(&world).0 > before).then_some(())).unwrap();
    let newest =
        world.status().unwrap()["process"]["kept"].as_array().unwrap().last().unwrap().as_u64().unwrap();
    // Before that the backup cannot give its files.
    world.wait_applied(newest).unwrap();
    let newest = newest.to_string();
    fs::write(&other, "longer").unwrap();
    let done = rollback(&world, &["--to", &newest]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("bad size"), "{said}");
    assert_eq!(world.finish().unwrap().code(), Some(128 + 9));
    is_right(&world);
}
