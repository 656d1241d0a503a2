//! Checkpoint equality of programs that change files by io_uring and AIO, on the file systems that can
//! be replicated. See [`bfs_tests::programs::requests`].

use bfs_tests::programs::fio::Fio;
use bfs_tests::programs::requests::{Mode, Requests};
use bfs_tests::world::{FileSystem, How, Transport, World, rounds};
use bfs_tests::{copy, exercise};

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

/// fio checks the backup of what it wrote, after checkpoints in the middle of it.
fn fio(engine: &'static str, options: &'static [&'static str], file_system: Option<FileSystem>) {
    let program = Fio { engine, options };
    let name = format!("fio-{engine}-{}", file_system.map_or("here", FileSystem::name));
    let mut world = World::new(&name, Transport::Unix).unwrap();
    if let Some(file_system) = file_system {
        world.mount(file_system).unwrap();
    }
    world.start(&program, How::Run).unwrap();
    for index in 0..3 {
        exercise::stopped(&world, index).unwrap();
        world.checkpoint().unwrap();
    }
    let _gate = Fio::enough(&world.place).unwrap();
    assert!(world.finish().unwrap().success(), "fio failed");
    exercise::equal(&world).unwrap();
    let at = world.scratch.join("verified");
    copy::exact(&world.backup(), &at).unwrap();
    // A long stop can make fio leave blocks out that were in flight: of these it says so of its own
    // files too.
    let wrong = program.verify(&world.place.data).unwrap();
    assert_eq!(program.verify(&at).unwrap(), wrong);
    assert!(wrong.len() < 100, "fio wrote nearly nothing: {wrong:?}");
}

#[test]
fn fio_with_a_ring() {
    fio("io_uring", &["--direct=1", "--fixedbufs=1", "--registerfiles=1"], None);
}

#[test]
fn fio_with_aio() {
    fio("libaio", &["--direct=1"], Some(FileSystem::Xfs));
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
