//! Checkpoint equality during real programs: 20 checkpoints each, half compared byte by byte with a
//! copy of the stopped primary, half checked as plain cuts; and the same when the agent is attached
//! half way. See [`bfs_tests::exercise`].

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::racing::RacingBuffer;
use bfs_tests::programs::scripts::{FsScript, GitWork, Postgres};
use bfs_tests::programs::sqlite::{Mode, Sqlite};
use bfs_tests::programs::unpack::Unpack;
use bfs_tests::world::{How, Transport, World, rounds};

fn replicated(program: &dyn Program, how: How, transport: Transport) {
    let kind = if how == How::Run { "run" } else { "attach" };
    let mut world = World::new(&format!("{}-{kind}", program.name()), transport).unwrap();
    exercise::checkpoints(&mut world, program, how, rounds(20, 60)).unwrap();
}

// The longest stands first: tests begin in the order of their names.
#[test]
fn a_source_tree_is_unpacked_and_removed() {
    replicated(&Unpack, How::Run, Transport::Tcp);
}

#[test]
fn append_writers() {
    replicated(&AppendWriters, How::Run, Transport::Tcp);
}

#[test]
fn sqlite_with_a_rollback_journal() {
    replicated(&Sqlite(Mode::Journal), How::Run, Transport::Unix);
}

#[test]
fn sqlite_with_a_write_ahead_log() {
    replicated(&Sqlite(Mode::Wal), How::Run, Transport::Tcp);
}

#[test]
fn shell_script() {
    replicated(&FsScript, How::Run, Transport::Unix);
}

#[test]
fn git() {
    replicated(&GitWork, How::Run, Transport::Unix);
}

#[test]
fn racing_buffer() {
    replicated(&RacingBuffer, How::Run, Transport::Unix);
}

#[test]
fn postgres() {
    replicated(&Postgres, How::Run, Transport::Unix);
}

#[test]
fn append_writers_attached_half_way() {
    replicated(&AppendWriters, How::AttachHalfWay, Transport::Unix);
}

#[test]
fn sqlite_attached_half_way() {
    replicated(&Sqlite(Mode::Journal), How::AttachHalfWay, Transport::Tcp);
}

#[test]
fn racing_buffer_attached_half_way() {
    replicated(&RacingBuffer, How::AttachHalfWay, Transport::Unix);
}

#[test]
fn postgres_attached_half_way() {
    replicated(&Postgres, How::AttachHalfWay, Transport::Unix);
}
