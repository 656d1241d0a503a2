//! What belongs to the group: includes and excludes, what is moved across their border, and directories that are
//! added and removed while a program works in them.

use std::fs;
use std::path::Path;

use bfs_tests::exercise;
use bfs_tests::oracle;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::printed_seed;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{FileSystem, How, Transport, World, rounds};

fn last(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Checkpoints while processes create, link, rename, exchange and remove at random across a border.
fn random_names(name: &str, options: &[&str], takes: &dyn Fn(&Path, bool) -> bool) {
    let _ = printed_seed();
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.agent_options(options);
    world.start(&RandomNames, How::Run).unwrap();
    for index in 0..rounds(6, 100) {
        if index % 3 == 2 {
            exercise::cut(&world, &RandomNames, index).unwrap();
        } else {
            exercise::stopped_taken(&world, index, takes).unwrap();
        }
    }
    assert!(world.finish().unwrap().success());
    let differences = oracle::compare_taken(&world.place.data, &world.backup(), takes).unwrap();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn random_names_across_the_border_of_excluded_names() {
    random_names("exclude-names", &["--exclude", "f[0-3]", "--exclude", "s1"], &|path, _| {
        !["f0", "f1", "f2", "f3", "s1"].contains(&last(path).as_str())
    });
}

#[test]
fn random_names_across_the_border_of_excluded_places() {
    random_names("exclude-places", &["--exclude", "/d0/s0", "--exclude", "**/s1/f*"], &|path, _| {
        let above = path.parent().map(last).unwrap_or_default();
        path != Path::new("d0/s0") && !(above == "s1" && last(path).starts_with('f'))
    });
}

#[test]
fn random_names_of_which_some_are_included() {
    let options = ["--include", "marks", "--include", "*[0-3]", "--exclude", "f3"];
    random_names("include-names", &options, &|path, directory| {
        let named = |name: String| name == "marks" || name.ends_with(['0', '1', '2', '3']);
        let mut parts = path.iter().map(|part| part.to_string_lossy().into_owned());
        last(path) != "f3" && (directory || parts.any(named))
    });
}

/// Temporary files that become real ones and the other way round, a folder that is left out and gives and
/// takes, links across the border, symlinks through it.
const BORDER: &str = "\
cd \"$1\"; mkdir -p cache/deep keep sub; echo early > cache/early; echo early > early.tmp
ln -s ../sub cache/way; i=0; while [ $i -lt 20 ]; do
    i=$((i + 1))
    echo $i > sub/new.tmp; echo more >> sub/new.tmp; mv sub/new.tmp sub/file-$i
    echo $i > sub/gone-$i; mv sub/gone-$i sub/gone-$i.tmp
    echo $i > cache/deep/f; mv cache/deep keep/deep-$i; mkdir cache/deep; echo $i >> keep/deep-$i/f
    mkdir keep/out-$i; echo $i > keep/out-$i/f; mv keep/out-$i cache/
    ln sub/file-$i sub/link-$i.tmp; chmod 640 sub/link-$i.tmp; ln cache/early keep/linked-$i
    echo $i >> cache/early; mkdir cache/way/by-$i; mv cache/way/by-$i cache/way/../../keep/
    (cd cache/deep && echo $i > f && mv f ../../sub/../keep/f-$i && mkdir -p x/y && rm -r x)
    mkdir keep/cache; echo $i > keep/cache/not-at-the-top; mv keep/cache keep/cache-$i
done
: > \"$2/ready\"
while [ ! -e \"$2/grow\" ]; do sleep 0.01; done
i=0; while [ $i -lt 40 ]; do i=$((i + 1)); head -c 100000 /dev/zero >> big.tmp; done
: > \"$2/grown\"
while [ ! -e \"$2/stop\" ]; do sleep 0.01; done";

fn border_takes(path: &Path, _: bool) -> bool {
    !last(path).ends_with(".tmp") && path != Path::new("cache")
}

fn equal_to_the_border(world: &World) {
    let differences = oracle::compare_taken(&world.place.data, &world.backup(), &border_takes).unwrap();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn what_is_left_out_travels_not_and_its_border_is_crossed_by_moves() {
    let mut world = World::new("border", Transport::Unix).unwrap();
    world.agent_options(&["--exclude", "*.tmp", "--exclude", "/cache"]);
    fs::write(world.place.data.join("before.tmp"), "x").unwrap();
    fs::write(world.place.data.join("before"), "x").unwrap();
    world.start_replayer().unwrap();
    world.run(&world.script(BORDER)).unwrap();
    world.checkpoint().unwrap();
    equal_to_the_border(&world);
    let bytes = || world.status_number(&["stream_bytes"]).unwrap();
    let before = bytes();
    fs::write(world.place.aux.join("grow"), "").unwrap();
    let grown = world.place.aux.join("grown");
    until("the program to grow a file", SOON, || grown.exists().then_some(())).unwrap();
    world.checkpoint().unwrap();
    assert!(bytes() - before < 20_000, "4 MB that nobody wants cost {} bytes", bytes() - before);
    let verified = world.agent_command(&["verify"], SOON).unwrap();
    assert_eq!(verified.status.code(), Some(0), "{}", String::from_utf8_lossy(&verified.stdout));
    // A successor leaves out the same.
    world.kill_agent().unwrap();
    world.resume().unwrap();
    world.checkpoint().unwrap();
    equal_to_the_border(&world);
    assert!(world.finish().unwrap().success());
    equal_to_the_border(&world);
}

/// A file is changed by a name outside, which is gone at once; only the agent before saw how it was made.
#[test]
fn a_name_outside_is_known_to_the_next_agent() {
    let mut world = World::new("name-outside", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let script = "echo one > \"$1/file\"; ln \"$1/file\" \"$2/name\"; : > \"$2/ready\"
        while [ ! -e \"$2/go\" ]; do sleep 0.02; done
        chmod 601 \"$2/name\"; rm \"$2/name\"; : > \"$2/changed\"
        while [ ! -e \"$2/stop\" ]; do sleep 0.02; done";
    world.run(&world.script(script)).unwrap();
    world.checkpoint().unwrap();
    world.kill_agent().unwrap();
    world.resume().unwrap();
    world.checkpoint().unwrap();
    fs::write(world.place.aux.join("go"), "").unwrap();
    let changed = world.place.aux.join("changed");
    until("the program", SOON, || changed.exists().then_some(())).unwrap();
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Runs `bfs-agent path WORDS`: its status, and what it says.
fn path(world: &World, words: &[&str]) -> (Option<i32>, String) {
    let done = world.agent_command(&[&["path"], words].concat(), SOON).unwrap();
    let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    (done.status.code(), said)
}

/// The numbers in a file that lines are appended to: all of them, from 1.
fn lines(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends in the middle of a line", path.display());
    for (index, line) in text.lines().enumerate() {
        assert_eq!(line.parse(), Ok(index as u64 + 1), "{}", path.display());
    }
    text.lines().count() as u64
}

/// A line in the first directory, then one in the second; names in both, and moves between them.
const TWO: &str = "\
mkdir \"$3/sub\"; echo early > \"$3/sub/early\"; ln \"$3/sub/early\" \"$1/linked\"; : > \"$2/ready\"; i=0
while [ ! -e \"$2/stop\" ]; do
    i=$((i + 1)); echo $i >> \"$1/before\"; echo $i >> \"$3/after\"; echo $i >> \"$1/linked\"
    mv \"$3/sub\" \"$3/sub-$i\"; mv \"$3/sub-$i\" \"$3/sub\"
    echo $i > \"$1/moves\"; mv \"$1/moves\" \"$3/sub/moved\"; mv \"$3/sub/moved\" \"$1/back\"
done";

#[test]
fn a_directory_is_added_and_removed_while_the_program_works() {
    let world = World::new("paths", Transport::Unix).unwrap();
    let more = world.root().join("more");
    fs::create_dir(&more).unwrap();
    added_and_removed(world, &more, TWO);
}

/// The same with a second directory on a file system that nobody looked at before: no links across.
const TWO_FILE_SYSTEMS: &str = "\
mkdir \"$3/sub\"; echo early > \"$3/sub/early\"; echo early > \"$1/linked\"; : > \"$2/ready\"; i=0
while [ ! -e \"$2/stop\" ]; do
    i=$((i + 1)); echo $i >> \"$1/before\"; echo $i >> \"$3/after\"
    mv \"$3/sub\" \"$3/sub-$i\"; mv \"$3/sub-$i\" \"$3/sub\"
    (echo $i > \"$3/made\"; mv \"$3/made\" \"$3/sub/moved\"; chmod 600 \"$3/sub/moved\")
done";

#[test]
fn a_directory_of_another_file_system_is_added_and_removed() {
    let mut world = World::new("paths-other", Transport::Unix).unwrap();
    // The first one is on a mount of its own, the second beside it.
    world.mount(FileSystem::Tmpfs).unwrap();
    let more = world.root().join("more");
    fs::create_dir(&more).unwrap();
    added_and_removed(world, &more, TWO_FILE_SYSTEMS);
}

/// Who mounts something below or beside the tree, works there and leaves, can unmount it.
const MOUNTS: &str = "\
mkdir \"$1/below\" \"$2/beside\"; : > \"$2/ready\"; i=0
while [ $i -lt 30 ]; do
    i=$((i + 1))
    for at in \"$1/below\" \"$2/beside\"; do
        mount -t tmpfs none \"$at\" || exit 8
        (cd \"$at\" && mkdir -p a/b && echo $i > a/f && mv a/f a/b/g && echo $i >> \"$1/log\" && rm -r a) || exit 9
    done
    : > \"$2/mounted-$i\"; while [ ! -e \"$2/go-$i\" ]; do sleep 0.01; done
    umount \"$1/below\" \"$2/beside\" || exit 10
done";

#[test]
fn what_a_program_mounts_it_can_unmount() {
    let mut world = World::new("mounted", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    world.run(&world.script(MOUNTS)).unwrap();
    for index in 1..=30 {
        let mounted = world.place.aux.join(format!("mounted-{index}"));
        until("mounts", SOON, || (mounted.exists() || !world.program_runs()).then_some(())).unwrap();
        // What was done there has been taken in.
        if index <= 10 {
            world.checkpoint().unwrap();
        }
        fs::write(world.place.aux.join(format!("go-{index}")), "").unwrap();
    }
    assert!(world.finish().unwrap().success());
    let differences = oracle::compare(&world.place.data, &world.backup()).unwrap();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// A file system whose directory was taken out of the group can be unmounted, while the agent works.
#[test]
fn what_was_taken_out_can_be_unmounted() {
    let mut world = World::new("taken-out", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let more = world.root().join("more");
    fs::create_dir(&more).unwrap();
    let mount = |verb: &str, words: &[&str]| {
        std::process::Command::new(verb).args(words).arg(&more).output().unwrap().status.success()
    };
    assert!(mount("mount", &["-t", "tmpfs", "none"]));
    world.run(&world.script(": > \"$2/ready\"; while [ ! -e \"$2/stop\" ]; do sleep 0.05; done")).unwrap();
    let shown = more.display().to_string();
    for _ in 0..2 {
        fs::write(more.join("file"), "content").unwrap();
        assert_eq!(path(&world, &["add", &shown]).0, Some(0));
        world.checkpoint().unwrap();
        assert!(!mount("umount", &[]), "it is replicated");
        assert_eq!(path(&world, &["remove", &shown]).0, Some(0));
        assert!(mount("umount", &[]), "nobody holds it");
        assert!(mount("mount", &["-t", "tmpfs", "none"]));
    }
    assert!(mount("umount", &[]));
    assert!(world.finish().unwrap().success());
}

fn added_and_removed(mut world: World, more: &Path, script: &str) {
    world.start_replayer().unwrap();
    let mut line = world.script(script);
    line.push(more.display().to_string());
    world.run(&line).unwrap();
    world.checkpoint().unwrap();
    let shown = more.display().to_string();
    let both = |world: &World, index: usize| {
        let copies = [0, 1].map(|which| world.scratch.join(format!("copy-{index}-{which}")));
        let script = "cp -a \"$0\" \"$1\" && cp -a \"$2\" \"$3\"";
        let mut words = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        let paths = [&world.place.data, &copies[0], more, &copies[1]];
        words.extend(paths.map(|path| path.display().to_string()));
        world.checkpoint_stopped(&words).unwrap();
        copies
    };
    let backup = world.store.join("tree").join(&world.group).join(more.strip_prefix("/").unwrap());
    let mut index = 0;
    for round in 0..2 {
        let (status, said) = path(&world, &["add", &shown]);
        assert!(status == Some(0) && said.trim().parse::<u64>().is_ok(), "{said}");
        for _ in 0..4 {
            index += 1;
            world.checkpoint().unwrap();
            let (first, then) = (lines(&world.backup().join("before")), lines(&backup.join("after")));
            assert!(
                first == then || first == then + 1,
                "{first} lines in one directory, {then} in the other"
            );
            if index == 3 {
                world.kill_agent().unwrap();
                world.resume().unwrap();
            }
            let copies = both(&world, index);
            for (copy, backup) in copies.iter().zip([&world.backup(), &backup]) {
                let differences = oracle::compare(copy, backup).unwrap();
                assert!(differences.is_empty(), "{}", differences.join("\n"));
            }
        }
        assert_eq!(path(&world, &["list"]).1, format!("{}\n{shown}\n", world.place.data.display()));
        let (status, said) = path(&world, &["remove", &shown]);
        assert_eq!(status, Some(0), "{said}");
        // The file with a name in both stays, with the one that is left.
        let copies = both(&world, index + 100 * (round + 1));
        let differences = oracle::compare(&copies[0], &world.backup()).unwrap();
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        assert!(!backup.exists() && world.backup().join("linked").exists());
    }
    assert_eq!(path(&world, &["list"]).1.trim(), world.place.data.display().to_string());
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn directories_that_cannot_be_added_or_removed_are_refused() {
    let mut world = World::new("paths-refused", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let script = "mkdir \"$1/in\"; : > \"$2/ready\"; while [ ! -e \"$2/stop\" ]; do sleep 0.01; done";
    world.run(&world.script(script)).unwrap();
    world.checkpoint().unwrap();
    let own = world.place.data.display().to_string();
    let inside = world.place.data.join("in").display().to_string();
    for (words, why) in [
        (["add", inside.as_str()], "overlap"),
        (["add", own.as_str()], "overlap"),
        (["add", "/nowhere"], "/nowhere"),
        (["add", "/proc"], "/proc"),
        (["remove", own.as_str()], "the last"),
        (["remove", inside.as_str()], "not among"),
    ] {
        let (status, said) = path(&world, &words);
        assert!(status == Some(70) && said.contains(why), "{words:?}: {status:?} {said}");
    }
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
}

#[test]
fn patterns_that_are_none_are_refused() {
    let mut world = World::new("border-refused", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let (path, backup) = (world.place.data.display().to_string(), world.destination());
    let run = ["run", "--path", &path, "--backup", &backup];
    for (options, why) in [
        (&["--exclude", "[a"][..], "\"[a\""),
        (&["--include", "/"], "matches nothing"),
        (&["--exclude", "a", "--rollback-on-failure"], "later version"),
    ] {
        let done = world.agent_command(&[&run[..], options, &["--", "true"]].concat(), SOON).unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(64), "{said}");
        assert!(said.contains(why), "{said}");
    }
}
