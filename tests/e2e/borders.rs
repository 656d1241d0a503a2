//! What belongs to the group: includes and excludes, and what is moved across their border.

use std::fs;
use std::path::Path;

use bfs_tests::exercise;
use bfs_tests::oracle;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::printed_seed;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, rounds};

/// The words of a shell that runs a script with the directories of the world, as `World::spawn_shell` has them.
fn shell(world: &World, script: &str) -> Vec<String> {
    let words = ["/bin/sh", "-c", script, "sh"].map(str::to_owned).to_vec();
    let place = [&world.place.data, &world.place.aux].map(|p| p.display().to_string());
    words.into_iter().chain(place).collect()
}

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
    world.run(&shell(&world, BORDER)).unwrap();
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
