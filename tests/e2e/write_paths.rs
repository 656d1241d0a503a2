//! Every way to change a file, on four file systems; and the table of them, docs/write-paths.md, is kept
//! true. See [`bfs_tests::rows`].

use std::collections::BTreeSet;
use std::path::Path;

use bfs_tests::rows::{self, session, table};
use bfs_tests::world::FileSystem;

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
