//! Checkpoint equality of programs that change files by io_uring and AIO, on the file systems that can
//! be replicated. See [`bfs_tests::programs::requests`].

use bfs_tests::exercise;
use bfs_tests::programs::requests::{Mode, Requests};
use bfs_tests::world::{FileSystem, How, Transport, World, rounds};

fn replicated(mode: Mode, file_system: Option<FileSystem>, how: How) {
    let kind = if how == How::Run { "run" } else { "attach" };
    let name = format!("{mode:?}-{}-{kind}", file_system.map_or("here", FileSystem::name)).to_lowercase();
    let mut world = World::new(&name, Transport::Unix).unwrap();
    if let Some(file_system) = file_system {
        world.mount(file_system).unwrap();
    }
    exercise::checkpoints(&mut world, &Requests(mode), how, rounds(8, 40)).unwrap();
}

#[test]
fn ring() {
    replicated(Mode::Ring, None, How::Run);
}

#[test]
fn ring_of_a_kernel_thread() {
    replicated(Mode::Polled, Some(FileSystem::Xfs), How::Run);
}

#[test]
fn ring_of_a_kernel_thread_attached_half_way() {
    replicated(Mode::Polled, None, How::AttachHalfWay);
}

#[test]
fn ring_that_tells_no_success() {
    replicated(Mode::Silent, Some(FileSystem::Tmpfs), How::Run);
}

#[test]
fn ring_with_direct_io() {
    replicated(Mode::Direct, Some(FileSystem::Btrfs), How::Run);
}

#[test]
fn aio_with_direct_io() {
    replicated(Mode::Aio, Some(FileSystem::Xfs), How::Run);
}

#[test]
fn aio_through_the_page_cache_attached_half_way() {
    replicated(Mode::AioBuffered, None, How::AttachHalfWay);
}

/// Every way on every file system.
#[test]
fn all_of_them() {
    if std::env::var_os("BFS_LONG").is_none() {
        return;
    }
    for mode in Mode::ALL {
        for file_system in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs, FileSystem::Tmpfs] {
            // tmpfs takes O_DIRECT since 6.6 and ignores it.
            replicated(mode, Some(file_system), How::Run);
        }
        replicated(mode, Some(FileSystem::Ext4), How::AttachHalfWay);
    }
}
