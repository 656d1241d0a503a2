//! Every way to change a file, on four file systems; and the table of them, docs/write-paths.md, is kept
//! true. See [`bfs_tests::rows`].

use std::collections::BTreeSet;
use std::path::Path;

use bfs_tests::exercise;
use bfs_tests::rows::{self, session, table};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{FileSystem, Transport, World};

fn replicated(file_system: FileSystem) {
    let outcome = session::run(file_system).unwrap();
    println!("{} rows on {}", outcome.done.len(), file_system.name());
    for row in &outcome.unsupported {
        println!("refused (row, errno): {row}");
    }
    assert!(outcome.wrong.is_empty(), "{}", outcome.wrong.join("\n"));
}

#[test]
fn rows_on_ext4() {
    replicated(FileSystem::Ext4);
}

#[test]
fn rows_on_xfs() {
    replicated(FileSystem::Xfs);
}

#[test]
fn rows_on_btrfs() {
    replicated(FileSystem::Btrfs);
}

#[test]
fn rows_on_tmpfs() {
    replicated(FileSystem::Tmpfs);
}

#[test]
fn a_subvolume_inside_is_refused() {
    let mut world = World::new("subvolume", Transport::Unix).unwrap();
    world.mount(FileSystem::Btrfs).unwrap();
    world.start_replayer().unwrap();
    let script = "touch \"$2/ready\"; btrfs -q subvolume create \"$1/inner\" > \"$2/made\" 2>&1; \
                  touch \"$2/done\"; while [ ! -e \"$2/stop\" ]; do sleep 0.1; done; rmdir \"$1/inner\"";
    let paths = [&world.place.data, &world.place.aux].map(|path| path.display().to_string());
    let line = ["sh", "-c", script, "sh"].map(str::to_owned).into_iter().chain(paths).collect::<Vec<_>>();
    world.run(&line).unwrap();
    let done = world.place.aux.join("done");
    until("the subvolume", SOON, || done.exists().then_some(())).unwrap();
    let limit = SOON;
    let refused =
        world.agent_command(&["checkpoint", "--wait", "applied", "--timeout", "5s"], limit).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("subvolume"), "{said}");
    // When it is gone, all is well again.
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn a_root_on_overlayfs_is_refused() {
    let mut world = World::new("overlay", Transport::Unix).unwrap();
    world.mount(FileSystem::Overlay).unwrap();
    world.start_replayer().unwrap();
    let refused = world.run(&["true".to_owned()]).unwrap_err();
    let said = std::fs::read_to_string(world.logs().join("agent.log")).unwrap();
    assert!(said.contains("can be replicated"), "{refused:#}: {said}");
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn lines() -> Vec<table::Line> {
    let text = std::fs::read_to_string(repository().join("docs/write-paths.md")).unwrap();
    table::parse(&text).unwrap()
}

/// The system calls and opcodes that cannot change a file, and why that is known.
const HARMLESS: &str = include_str!("write_paths/harmless.txt");

#[test]
fn every_line_of_the_table_names_tests_that_exist() {
    let mut tested = BTreeSet::new();
    for line in lines() {
        for test in line.tests {
            assert!(
                table::test_exists(repository(), &test).unwrap(),
                "{}: there is no test {test}",
                line.way
            );
            tested.insert(test);
        }
    }
    for row in rows::all() {
        assert!(tested.contains(row.name), "{} stands in no line of docs/write-paths.md", row.name);
    }
}

#[test]
fn every_system_call_of_this_kernel_is_in_the_table_or_harmless() {
    let in_table: BTreeSet<String> = lines().into_iter().flat_map(|line| line.calls).collect();
    let harmless = table::words(HARMLESS);
    let both: Vec<_> = in_table.intersection(&harmless).collect();
    assert!(both.is_empty(), "in the table and harmless: {both:?}");
    let unknown: Vec<_> = table::system_calls()
        .unwrap()
        .into_iter()
        .filter(|call| !in_table.contains(call) && !harmless.contains(call))
        .collect();
    assert!(
        unknown.is_empty(),
        "can these change a file? Then they need a line in docs/write-paths.md, else a place in \
         tests/e2e/write_paths/harmless.txt: {unknown:?}"
    );
}
