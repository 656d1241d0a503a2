//! A store is scrubbed without the primary: what is sound is called sound, what was spoiled is named, with
//! the checkpoints that need it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bfs_agent::backup::check::{Problem, Report, check};
use bfs_agent::backup::{BackupError, Replayer, ReplayerHandle, ServeOptions};
use bfs_common::record::*;
use bfs_common::wire::Frame;

#[allow(dead_code, reason = "made for more than is tested here")]
#[path = "replayer/client.rs"]
mod client;

use client::*;

/// Four checkpoints of two files, a directory and a symlink; and something behind the last.
async fn made(store: &Path) {
    let options = ServeOptions { store: store.into(), ..ServeOptions::default() };
    let replayer = Replayer::start(options).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    for object in [2, 3] {
        agent.object(object, FileKind::Regular, 0o600, b"");
        agent.entry(1, &format!("file{object}"), object);
        agent.write(object, 0, &[object as u8; 100_000]);
    }
    agent.object(4, FileKind::Directory, 0o755, b"");
    agent.entry(1, "folder", 4);
    agent.object(5, FileKind::Symlink, 0o777, b"target");
    agent.entry(4, "link", 5);
    for n in 1..=4 {
        agent.write(2, n * 1000, b"overwritten");
        agent.checkpoint().await;
    }
    agent.write(3, 5, b"pending");
    agent.flush().await;
    drop(agent);
    drop(replayer);
}

fn found(store: &Path) -> Report {
    check(store, true, &[]).unwrap()
}

fn numbers(problem: &Problem) -> Vec<u64> {
    problem.generations.iter().map(|c| c.0).collect()
}

/// Spoils a byte for as long as `look` takes.
fn spoiled(path: &Path, at: u64, look: impl FnOnce()) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let times = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    look();
    file.write_all_at(&byte, at).unwrap();
    file.set_modified(times).unwrap();
}

fn only(folder: PathBuf) -> PathBuf {
    std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).min().unwrap()
}

#[tokio::test]
async fn damage_is_named_with_what_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    made(&store).await;
    let sound = found(&store);
    assert_eq!(sound.problems, []);
    assert_eq!(sound.objects, 5);
    assert!(sound.records > 10 && sound.lines >= 6 && sound.bytes > 200_000, "{sound:?}");

    // Every part of the log: header, records, commits.
    let log = only(store.join("log/g"));
    let length = std::fs::metadata(&log).unwrap().len();
    for at in [9, 20, 50, 150, length / 2, length - 30, length - 1] {
        spoiled(&log, at, || {
            let report = found(&store);
            assert_eq!(report.problems.len(), 1, "byte {at} of {length}: {:?}", report.problems);
            let problem = &report.problems[0];
            assert!(problem.what.contains("/log/g/"), "{problem}");
            assert_eq!(numbers(problem), [0; 0], "what is applied needs no log");
        });
    }
    // The images of the step from checkpoint 2: the checkpoints up to it need them.
    let image = store.join("images/g/00000000000000000002.img");
    let length = std::fs::metadata(&image).unwrap().len();
    for at in (0..length).step_by(61) {
        spoiled(&image, at, || {
            let report = found(&store);
            assert_eq!(report.problems.len(), 1, "byte {at} of {length}: {:?}", report.problems);
            assert!(report.problems[0].what.contains("002.img"), "{}", report.problems[0]);
            assert_eq!(numbers(&report.problems[0]), [1, 2], "{}", report.problems[0]);
        });
    }
    let away = store.join("images/away");
    std::fs::rename(&image, &away).unwrap();
    assert!(found(&store).problems[0].why.contains("missing"));
    std::fs::rename(&away, &image).unwrap();
    // The tree.
    let root = store.join("tree/g").join(ROOT.trim_start_matches('/'));
    spoiled(&root.join("file3"), 7, || {
        let report = found(&store);
        let text = report.problems[0].to_string();
        assert!(report.problems.len() == 1 && text.contains("/data/app/file3"), "{text}");
        assert_eq!(numbers(&report.problems[0]), [1, 2, 3, 4], "{text}");
    });
    // A byte under the right times: in a block that no step touched, and in one that all of them did, of which
    // images have what stands at 1000 to 4011 for the checkpoints before.
    for (name, at, needed) in [
        ("file3", 70_000, vec![1, 2, 3, 4]),
        ("file2", 80_000, vec![1, 2, 3, 4]),
        ("file2", 4005, vec![1, 2, 3, 4]),
    ] {
        let path = root.join(name);
        let times = std::fs::metadata(&path).unwrap().modified().unwrap();
        spoiled(&path, at, || {
            std::fs::File::options().append(true).open(&path).unwrap().set_modified(times).unwrap();
            let report = found(&store);
            let text = report.problems[0].to_string();
            assert!(report.problems.len() == 1 && text.contains(name), "{text}");
            let start = at / 65_536 * 65_536;
            let range = format!("bytes {start} to {} do not fit", (start + 65_536).min(100_000));
            assert!(text.contains(&range), "{text}");
            assert_eq!(numbers(&report.problems[0]), needed, "{text}");
            assert!(check(&store, false, &[]).unwrap().problems.is_empty());
        });
    }
    std::fs::write(root.join("folder/more"), "").unwrap();
    let problems = found(&store).problems;
    assert!(problems.iter().any(|p| p.why.contains("nobody put there")), "{problems:?}");
    std::fs::remove_file(root.join("folder/more")).unwrap();
    std::fs::remove_file(root.join("folder/link")).unwrap();
    let problems = found(&store).problems;
    assert!(problems.iter().any(|p| p.why.contains("lacks")), "{problems:?}");
    assert!(problems.iter().any(|p| p.what.contains("object 5")), "{problems:?}");
}

/// A checkpoint of which images have all that is wrong does not need it; nor does what a kept file has concern
/// those that never had it.
#[tokio::test]
async fn only_what_stands_on_wrong_bytes_needs_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let options = ServeOptions { store: store.clone(), ..ServeOptions::default() };
    let replayer = Replayer::start(options).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.checkpoint().await;
    for object in [2, 3] {
        agent.object(object, FileKind::Regular, 0o600, b"");
        agent.entry(1, &format!("file{object}"), object);
        agent.write(object, 0, &[7; 70_000]);
    }
    agent.checkpoint().await;
    agent.write(2, 0, &[8; 65_536]);
    agent.delete(1, "file3");
    agent.put(Record::Forget { object: ObjectId(3) }, b"");
    agent.checkpoint().await;
    drop(agent);
    drop(replayer);
    assert_eq!(found(&store).problems, []);
    let root = store.join("tree/g").join(ROOT.trim_start_matches('/'));
    for (path, at, needed) in [
        (root.join("file2"), 9, vec![3]),
        (root.join("file2"), 65_536, vec![2, 3]),
        (store.join("kept/g/3"), 9, vec![2]),
    ] {
        let times = std::fs::metadata(&path).unwrap().modified().unwrap();
        spoiled(&path, at, || {
            std::fs::File::options().append(true).open(&path).unwrap().set_modified(times).unwrap();
            let problems = found(&store).problems;
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!(numbers(&problems[0]), needed, "{}", problems[0]);
        });
    }
    std::fs::remove_file(store.join("kept/g/3")).unwrap();
    let problems = found(&store).problems;
    assert!(problems.len() == 1 && problems[0].why.contains("not kept"), "{problems:?}");
    assert_eq!(numbers(&problems[0]), [2]);
}

/// What a crash left behind the last commit is no damage; the store of somebody else is left alone.
#[tokio::test]
async fn a_torn_tail_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    made(&store).await;
    let log = only(store.join("log/g"));
    let file = std::fs::File::options().append(true).open(&log).unwrap();
    std::io::Write::write_all(&mut &file, &[7; 100]).unwrap();
    assert_eq!(found(&store).problems, []);
    let _owner = Replayer::start(ServeOptions { store: store.clone(), ..ServeOptions::default() }).unwrap();
    assert!(matches!(check(&store, false, &[]), Err(BackupError::InUse { .. })));
    let none = check(dir.path(), false, &[]);
    assert!(matches!(none, Err(BackupError::NoStore(_))));
}

/// Every file of a store but its index, with all its bytes.
fn files(store: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders: Vec<PathBuf> = ["log", "tree", "images", "kept"].map(|name| store.join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else if entry.file_type().unwrap().is_file() {
                all.insert(entry.path(), std::fs::read(entry.path()).unwrap());
            }
        }
    }
    all
}

fn start(store: &Path) -> Result<ReplayerHandle, BackupError> {
    Replayer::start(ServeOptions { store: store.into(), ..ServeOptions::default() })
}

/// The bytes of file 2 at each of the four checkpoints.
async fn all_are_read(store: &Path) {
    let replayer = start(store).unwrap();
    for at in 1..=4 {
        let mut connection = replayer.connect_local();
        let ask = Frame::GetContents { group: "g".into(), at: CheckpointId(at), objects: vec![ObjectId(2)] };
        connection.writer.send(&ask, b"").await.unwrap();
        let (frame, body) = connection.reader.next().await.unwrap().unwrap();
        assert!(matches!(frame, Frame::Content { object: ObjectId(2), offset: 0, .. }), "{frame:?}");
        let mut then = [2; 65_536];
        (1..=at as usize).for_each(|n| then[n * 1000..][..11].copy_from_slice(b"overwritten"));
        assert!(body[..then.len().min(body.len())] == then[..body.len().min(then.len())], "checkpoint {at}");
    }
}

/// Without its index a store is not taken for an empty one: nothing starts, and nothing that it has is touched. With
/// the index all is there again. What needs no index are the files in the tree.
#[tokio::test]
async fn a_store_whose_index_is_gone_or_spoiled_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    made(&store).await;
    let (index, before) = (store.join("index.redb"), files(&store));
    let sound = std::fs::read(&index).unwrap();
    let mut spoiled =
        vec![Vec::new(), vec![0; sound.len()], b"junk".to_vec(), sound[..sound.len() / 2].to_vec()];
    spoiled.push([vec![0xff; 4096], sound[4096..].to_vec()].concat());
    for bytes in spoiled.into_iter().map(Some).chain([None]) {
        let what = bytes.as_ref().map_or("none".into(), |b| format!("{} bytes: {:?}..", b.len(), b.get(..4)));
        match &bytes {
            Some(bytes) => std::fs::write(&index, bytes).unwrap(),
            None => std::fs::remove_file(&index).unwrap(),
        }
        let refused = start(&store).map(drop).unwrap_err();
        assert!(refused.to_string().contains("index"), "{what}: {refused}");
        let is_missing = matches!(&refused, BackupError::NoIndex { group, .. } if group == "g");
        assert_eq!(is_missing, bytes.is_none(), "{what}: {refused}");
        let checked = check(&store, true, &[]).unwrap_err();
        assert!(checked.to_string().contains("index"), "{what}: {checked}");
        assert!(files(&store) == before, "{what}: nothing else was touched");
        assert_eq!(std::fs::read(&index).ok(), bytes, "{what}: nor the index");
        // The newest checkpoint stands there.
        let newest = std::fs::read(tree(&store).join("file2")).unwrap();
        assert_eq!((newest.len(), &newest[4000..4011]), (100_000, &b"overwritten"[..]));
    }
    std::fs::write(&index, &sound).unwrap();
    all_are_read(&store).await;
    assert_eq!(found(&store).problems, []);
}

/// An index of an earlier checkpoint does not fit to files of a later one.
#[tokio::test]
async fn an_older_copy_of_the_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = start(&store).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "file2", 2);
    agent.write(2, 0, &[2; 100_000]);
    agent.write(2, 1000, b"overwritten");
    agent.checkpoint().await;
    drop((agent, replayer));
    let index = store.join("index.redb");
    let older = std::fs::read(&index).unwrap();
    let replayer = start(&store).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    for n in 2..=4 {
        agent.write(2, n * 1000, b"overwritten");
        agent.checkpoint().await;
    }
    drop((agent, replayer));
    let (sound, before) = (std::fs::read(&index).unwrap(), files(&store));
    std::fs::write(&index, older).unwrap();
    let refused = start(&store).map(drop).unwrap_err().to_string();
    assert!(refused.contains("older copy") && refused.contains("checkpoint 1"), "{refused}");
    assert!(check(&store, true, &[]).unwrap_err().to_string().contains("older copy"));
    assert!(files(&store) == before, "nothing was touched");
    // Also where there is no copy that would know better.
    let (copy, aside) = (store.join("index-copy"), dir.path().join("aside"));
    std::fs::rename(&copy, &aside).unwrap();
    let without = start(&store).map(drop).unwrap_err().to_string();
    assert!(without.contains("older copy") && without.contains("checkpoint 1"), "{without}");
    assert!(found(&store).problems.iter().any(|problem| problem.why.contains("older copy")));
    assert!(files(&store) == before, "nothing was touched");
    std::fs::rename(&aside, &copy).unwrap();
    std::fs::write(&index, sound).unwrap();
    all_are_read(&store).await;
    assert_eq!(found(&store).problems, []);
}
