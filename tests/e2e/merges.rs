//! Checkpoints that are made one, killed on the way: by the command that does it itself because nobody owns the store,
//! by the replayer that serves it, and beside an agent that goes on. What is still kept afterwards is what it was,
//! each time compared with a copy of the primary, and the same merge can be done again.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bfs_tests::copy;
use bfs_tests::faults::{Effect, Fault, Faults};
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::Random;
use bfs_tests::stores::{is_sound, kept, replayer, restored_equals};
use bfs_tests::world::{How, Transport, World, command_ok, rounds};

/// A long run ends after this, however many kills there were.
const LONGEST: Duration = Duration::from_secs(3600);

/// Checkpoints with a copy of the primary at each; others lie between them.
type Copies = Vec<(u64, PathBuf)>;

/// The program works on, then it stands and is copied.
fn copied(world: &World, copies: &mut Copies) {
    world.checkpoint().unwrap();
    let at = world.scratch.join(format!("then-{}", copies.len()));
    let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
    copies.push((number, at));
}

/// What the store says that it keeps equals its copy; and nothing else went than what may be gone.
fn all_are_given_back(world: &World, copies: &[(u64, PathBuf)], may_be_gone: &[(u64, u64)]) {
    let kept = kept(world, &world.store);
    for (number, at) in copies {
        if kept.contains(number) {
            restored_equals(world, &world.store, *number, at);
        } else {
            let may = may_be_gone.iter().any(|(from, to)| from <= number && number < to);
            assert!(may, "checkpoint {number} is not among {kept:?}; merged were {may_be_gone:?}");
        }
    }
}

fn merge_command(world: &World, from: u64, to: u64) -> Command {
    let words = ["merge", "--group", &world.group, "--keep-min", "1"];
    let mut command = replayer(&words, &world.store);
    command.args([from.to_string(), to.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Everything of a store that a merge changes, put aside.
struct Aside(PathBuf);

impl Aside {
    /// Files in `kept` are the same ones: the index knows their inode numbers.
    fn copy(from: &Path, to: &Path) {
        let script =
            "cp -a \"$0/index.redb\" \"$0/index-copy\" \"$0/images\" \"$1/\"; cp -al \"$0/kept\" \"$1/\"";
        command_ok(Command::new("/bin/sh").args(["-ec", script]).args([from, to])).unwrap();
    }

    fn of(world: &World) -> Self {
        let aside = world.scratch.join("aside");
        fs::create_dir(&aside).unwrap();
        Self::copy(&world.store, &aside);
        Self(aside)
    }

    fn put_back(&self, world: &World) {
        for folder in ["images", "kept", "index-copy"] {
            fs::remove_dir_all(world.store.join(folder)).unwrap();
        }
        Self::copy(&self.0, &world.store);
    }
}

/// A kill at a call.
fn kill(at: u64, random: &mut Random) -> Fault {
    Fault { at, lasting: false, effect: Effect::Kills, torn: random.chance(50) }
}

/// The command without an owner of the store, under faults; whether it was killed.
fn alone(world: &World, faults: &mut Faults, from: u64, to: u64) -> bool {
    let mut command = merge_command(world, from, to);
    let done = faults.hold(command.stderr(Stdio::piped())).unwrap().spawn().unwrap();
    let done = done.wait_with_output().unwrap();
    let killed = done.status.signal() == Some(libc::SIGKILL);
    assert!(killed || done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    killed
}

/// The same by a replayer that serves the store; whether it was killed.
fn served(world: &mut World, fault: Fault, from: u64, to: u64) -> bool {
    world.start_replayer().unwrap();
    world.faults().expect("given by the test").set(fault);
    // Its status says nothing: the replayer may be gone when the answer is on its way.
    merge_command(world, from, to).stderr(Stdio::null()).status().unwrap();
    let killed = !world.faults().expect("given by the test").failed().is_empty();
    world.faults().expect("given by the test").lift();
    world.kill_replayer().unwrap();
    killed
}

/// Killed at each of its calls in turn, and once more while that is made good: by another try, or by a start.
#[test]
fn a_merge_may_be_killed_at_each_call() {
    let mut world = World::new("merge-kills", Transport::Unix).unwrap();
    world.replayer_options(&["--keep-min", "1"]);
    world.start(&RandomNames, How::Run).unwrap();
    let mut copies = Copies::new();
    (0..6).for_each(|_| copied(&world, &mut copies));
    world.finish().unwrap();
    world.kill_replayer().unwrap();
    let aside = Aside::of(&world);
    let number = |index: usize| copies[index].0;
    let mut by_command = Faults::new(&world.store);
    world.replayer_faults(Faults::new(&world.store));
    // How many calls there are.
    let (mut from, mut to) = (number(1), number(4));
    assert!(!alone(&world, &mut by_command, from, to));
    let calls = by_command.count();
    all_are_given_back(&world, &copies, &[(from, to)]);
    assert!(!kept(&world, &world.store).contains(&from), "it was merged");

    let mut random = Random::printed();
    let (began, mut cases, mut killed) = (Instant::now(), 0, 0);
    let stride = rounds(calls as usize / 4 + 1, 1) as u64;
    let mut at = 1 + random.next() % stride;
    while at <= calls && began.elapsed() < LONGEST {
        for by_server in [false, true] {
            aside.put_back(&world);
            if random.chance(25) {
                // Also with none before them.
                (from, to) = (number(0), number(1 + random.below(4)));
            } else {
                (from, to) = (number(1 + random.below(2)), number(3 + random.below(2)));
            }
            let fault = kill(at, &mut random);
            let first = if by_server {
                served(&mut world, fault, from, to)
            } else {
                by_command.set(fault);
                alone(&world, &mut by_command, from, to)
            };
            killed += usize::from(first);
            all_are_given_back(&world, &copies, &[(from, to)]);
            // What is made of that is killed as well.
            let again = kill(1 + random.next() % calls, &mut random);
            let still = kept(&world, &world.store).contains(&from);
            if still && random.chance(50) {
                by_command.set(again);
                killed += usize::from(alone(&world, &mut by_command, from, to));
            } else {
                world.faults().expect("given above").set(again);
                // If it does not come, it was killed.
                killed += usize::from(world.start_replayer().is_err());
                world.faults().expect("given above").lift();
                world.kill_replayer().unwrap();
            }
            by_command.lift();
            all_are_given_back(&world, std::slice::from_ref(random.of(&copies)), &[(from, to)]);
            if kept(&world, &world.store).contains(&from) {
                assert!(!alone(&world, &mut by_command, from, to));
            }
            // A start removes what nobody needs.
            world.start_replayer().unwrap();
            world.kill_replayer().unwrap();
            let kept = kept(&world, &world.store);
            assert!(!kept.iter().any(|n| from <= *n && *n < to) && kept.contains(&to), "{kept:?}");
            all_are_given_back(&world, &copies, &[(from, to)]);
            is_sound(&world.store);
            let images = fs::read_dir(world.store.join("images").join(&world.group)).unwrap();
            let images: Vec<_> = images.map(|e| e.unwrap().file_name()).collect();
            assert_eq!(images.len(), kept.len() - 1, "{images:?} for {kept:?}");
            cases += 1;
        }
        at += stride;
    }
    eprintln!("{calls} calls, {cases} merges, {killed} kills in {:?}", began.elapsed());
    assert!(killed >= cases / 2, "{killed} kills in {cases} merges came about");
}

/// The replayer is killed in merges while an agent writes to it, comes back, and both go on.
#[test]
fn merges_are_killed_beside_an_agent() {
    let mut world = World::new("merge-busy", Transport::Unix).unwrap();
    world.replayer_options(&["--keep-min", "1"]);
    world.replayer_faults(Faults::new(&world.store));
    world.start(&RandomNames, How::Run).unwrap();
    let mut random = Random::printed();
    let (mut copies, mut may_be_gone, mut killed) = (Copies::new(), Vec::new(), 0);
    (0..3).for_each(|_| copied(&world, &mut copies));
    let began = Instant::now();
    for _ in 0..rounds(4, 100) {
        if began.elapsed() > LONGEST {
            break;
        }
        copied(&world, &mut copies);
        let left: Vec<u64> = kept(&world, &world.store);
        let (from, to) = (random.below(left.len() - 2), 2 + random.below(4));
        let (from, to) = (left[from], left[(from + to).min(left.len() - 1)]);
        may_be_gone.push((from, to));
        let fault = kill(1 + random.next() % 40, &mut random);
        let faults = world.faults().expect("given above");
        faults.set(fault);
        merge_command(&world, from, to).stderr(Stdio::null()).status().unwrap();
        let hit = !faults.failed().is_empty();
        faults.lift();
        if hit {
            killed += 1;
            world.kill_replayer().unwrap();
            world.start_replayer().unwrap();
        }
        let (number, at) = random.of(&copies);
        if kept(&world, &world.store).contains(number) {
            restored_equals(&world, &world.store, *number, at);
        }
    }
    world.checkpoint().unwrap();
    all_are_given_back(&world, &copies, &may_be_gone);
    assert!(world.finish().unwrap().success());
    world.kill_replayer().unwrap();
    all_are_given_back(&world, &copies, &may_be_gone);
    is_sound(&world.store);
    assert!(killed > 0, "no kill came about");
    eprintln!(
        "{killed} kills in {:?}, {} checkpoints left",
        began.elapsed(),
        kept(&world, &world.store).len()
    );
}
