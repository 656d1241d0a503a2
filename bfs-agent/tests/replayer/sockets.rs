//! Who gets in over the sockets of a replayer, and what of strangers comes to nothing.

use std::time::Duration;

use bfs_agent::backup::{BackupError, Replayer, ServeOptions, store_keys};
use bfs_agent::keys::Folder;
use bfs_agent::net::{self, ConnectError, Destination};
use bfs_common::wire::*;

use super::client::{next, refusal};

#[tokio::test]
async fn sockets_authenticate_and_strangers_are_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let unix = Destination::Unix(dir.path().join("sock"));
    let (store, keys) = (dir.path().join("store"), Folder::new(dir.path().join("keys")));
    let options = ServeOptions {
        store: store.clone(),
        listen: vec!["tcp://127.0.0.1:0".parse().unwrap(), unix.clone()],
        ..ServeOptions::default()
    };
    let again = options.clone();
    let replayer = Replayer::start(options).unwrap();
    let tcp = replayer.listening()[1].clone();
    // Each has to know the other.
    let error = net::connect(&tcp, &keys).await.unwrap_err();
    assert!(matches!(error, ConnectError::NotPaired(_)), "{error}");
    let theirs = store_keys(&store);
    let known = theirs.host_key().unwrap().fingerprint();
    keys.change(|peers| peers.trust(&tcp.to_string(), known)).unwrap();
    let error = net::connect(&tcp, &keys).await.unwrap_err();
    assert!(matches!(error, ConnectError::NotKnown { .. }), "{error}");
    let ours = keys.host_key().unwrap().fingerprint();
    theirs.change(|peers| peers.allow(ours, None, &[("g".into(), [].into())].into())).unwrap();
    // Commands say that keys were changed over a socket of the host, and only there.
    let mut connection = net::connect(&unix, &keys).await.unwrap();
    connection.writer.send(&Frame::ReadKeys, b"").await.unwrap();
    assert_eq!(next(&mut connection).await, Frame::KeysRead { ended: 0 });
    for address in [&tcp, &unix, &replayer.listening()[0]] {
        let mut connection = net::connect(address, &keys).await.unwrap();
        connection.writer.send(&Frame::GetStatus, b"").await.unwrap();
        assert_eq!(next(&mut connection).await, Frame::Status { groups: Vec::new() });
    }
    let mut connection = net::connect(&tcp, &keys).await.unwrap();
    connection.writer.send(&Frame::ReadKeys, b"").await.unwrap();
    assert!(matches!(refusal(&mut connection).await, Refusal::Bad(_)));
    // A name that cannot be one is neither repeated whole nor anybody's.
    for frame in [
        Frame::GetGenerations { group: "../".repeat(1 << 20) },
        Frame::GetDamage { group: "\u{0}".repeat(1 << 20), heal: true, suspects: Vec::new() },
    ] {
        let mut connection = net::connect(&tcp, &keys).await.unwrap();
        connection.writer.send(&frame, b"").await.unwrap();
        assert!(matches!(refusal(&mut connection).await, Refusal::Bad(text) if text.len() < 5000));
    }
    // Garbage and another version: closed, and the replayer goes on.
    let Destination::Tcp(address) = &tcp else { panic!() };
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"bfs1\x07\0\0\0", &[0xff; 5000]] {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.unwrap();
    }
    net::connect(&tcp, &keys).await.unwrap();
    let error = Replayer::start(again).unwrap_err();
    assert!(matches!(error, BackupError::InUse { .. }), "{error}");
}
