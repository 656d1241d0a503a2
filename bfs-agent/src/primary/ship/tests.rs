//! The shipper against a scripted replayer that speaks the real codec.

use super::queue::tests::batch;
use super::*;
use bfs_common::codec;
use bfs_common::record::{ChainHash, Sequence};
use bfs_common::wire::unpack;

use crate::net::{Connection, local_pair};
use crate::primary::spool::{Address, SpoolOptions};
use std::sync::mpsc;

/// The replayer's ends of the connections, in the order in which the shipper makes them.
fn replayer() -> (Connect, mpsc::Receiver<Connection>) {
    let (ends, theirs) = mpsc::channel();
    let ends = Mutex::new(ends);
    let connect: Connect = Arc::new(move || {
        let (ours, theirs) = local_pair();
        let sent = ends.lock().unwrap().send(theirs);
        Box::pin(async move {
            sent.map_err(|_| ConnectError::NotANetwork("the script has ended".into()))?;
            Ok(ours)
        })
    });
    (connect, theirs)
}

fn options(connect: Connect) -> ShipOptions {
    ShipOptions {
        connect,
        group: "g".into(),
        group_id: GroupId([1; 16]),
        boot_id: [2; 16],
        epoch: None,
        take_over: false,
        maps: Vec::new(),
        retain_bytes_max: 4000,
        start_limit: Duration::from_secs(10),
        sending: Sending::default(),
    }
}

fn welcome(position: Position) -> Frame {
    Frame::Welcome {
        epoch: Epoch(5),
        position,
        confirmed: CheckpointId(0),
        applied: CheckpointId(0),
        highest_object: ObjectId(0),
        gaps: Vec::new(),
        roots: Vec::new(),
        boot_id: [0; 16],
        adopt: None,
        lz4: false,
    }
}

fn position(at: (Sequence, ChainHash)) -> Position {
    Position { epoch: Epoch(5), sequence: at.0, chain: at.1 }
}

const BEGIN: (Sequence, ChainHash) = (Sequence(0), ChainHash::START);

struct Script {
    connection: Connection,
    runtime: tokio::runtime::Runtime,
}

impl Script {
    fn accept(ends: &mpsc::Receiver<Connection>, answer: Frame) -> (Self, Option<Epoch>) {
        let connection = ends.recv_timeout(Duration::from_secs(10)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut script = Self { connection, runtime };
        let Frame::Hello { epoch, .. } = script.next().0 else { panic!("no Hello") };
        script.send(answer);
        (script, epoch)
    }

    fn next(&mut self) -> (Frame, bytes::Bytes) {
        let next = self.connection.reader.next();
        self.runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(10), next).await })
            .unwrap()
            .unwrap()
            .unwrap()
    }

    fn send(&mut self, frame: Frame) {
        self.runtime.block_on(self.connection.writer.send(&frame, b"")).unwrap();
    }

    /// The numbers of the next records; answers pings.
    fn records(&mut self) -> Vec<u64> {
        loop {
            match self.next() {
                (Frame::Ping(number), _) => self.send(Frame::Pong(number)),
                (Frame::Records { first, count }, mut body) => {
                    let mut numbers = Vec::new();
                    while let Some(record) = codec::take(&mut body).unwrap() {
                        numbers.push(record.sequence.0);
                    }
                    assert_eq!((numbers[0], numbers.len()), (first.0, count as usize));
                    return numbers;
                }
                (other, _) => panic!("{other:?}"),
            }
        }
    }

    fn ack(&mut self, at: (Sequence, ChainHash)) {
        let position = position(at);
        self.send(Frame::Ack {
            position,
            confirmed: CheckpointId(1),
            applied: CheckpointId(0),
            state: StoreState::Ready,
        });
    }
}

fn started(first: Frame) -> (Shipper, Script, mpsc::Receiver<Connection>) {
    let (connect, ends) = replayer();
    let starting = std::thread::spawn(move || Shipper::start(options(connect), None, None).unwrap());
    let (script, epoch) = Script::accept(&ends, first);
    assert_eq!(epoch, None);
    let (shipper, welcome) = starting.join().unwrap();
    assert_eq!(welcome.epoch, Epoch(5));
    (shipper, script, ends)
}

fn until(shipper: &Shipper, what: impl Fn(&Progress) -> bool) -> Progress {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut progress = shipper.progress();
    while !what(&progress) {
        assert!(Instant::now() < deadline, "{progress:?}");
        progress = shipper.wait_change(progress.version, deadline);
    }
    progress
}

#[test]
fn a_reconnect_resends_exactly_what_is_not_durable() {
    let (shipper, mut script, ends) = started(welcome(position(BEGIN)));
    let mut at = BEGIN;
    shipper.try_push(batch(&mut at, &[10, 10]), false).unwrap();
    let first = at;
    shipper.try_push(batch(&mut at, &[10]), false).unwrap();
    assert_eq!(script.records(), [1, 2]);
    assert_eq!(script.records(), [3]);
    script.ack(first);
    let progress = until(&shipper, |p| p.durable.sequence == first.0);
    assert_eq!(progress.released_ring_position, Some(200));
    assert_eq!(progress.confirmed, CheckpointId(1));
    drop(script);

    let (mut script, epoch) = Script::accept(&ends, welcome(position(first)));
    assert_eq!(epoch, Some(Epoch(5)), "the epoch is held over a reconnect");
    assert_eq!(script.records(), [3]);
    shipper.try_push(batch(&mut at, &[10]), false).unwrap();
    assert_eq!(script.records(), [4], "nothing is sent twice on one connection");
    script.ack(at);
    let progress = until(&shipper, |p| p.retained_bytes == 0);
    assert_eq!((progress.reconnects, progress.released_ring_position), (1, Some(400)));
}

#[test]
fn the_bound_gives_the_batch_back_and_an_acknowledgement_makes_room() {
    let (shipper, mut script, _ends) = started(welcome(position(BEGIN)));
    let mut at = BEGIN;
    shipper.try_push(batch(&mut at, &[3000]), false).unwrap();
    let first = at;
    let Err(Full(second)) = shipper.try_push(batch(&mut at, &[3000]), false) else {
        panic!("beyond the bound")
    };
    assert_eq!(script.records(), [1]);
    script.ack(first);
    until(&shipper, |p| p.retained_bytes == 0);
    shipper.try_push(second, false).unwrap();
    assert_eq!(script.records(), [2]);
}

#[test]
fn a_refusal_is_final() {
    let (shipper, mut script, ends) = started(welcome(position(BEGIN)));
    script.send(Frame::Refused(Refusal::Fenced { newest: Epoch(6) }));
    let progress = until(&shipper, |p| p.refusal.is_some());
    assert_eq!(progress.refusal, Some(Refusal::Fenced { newest: Epoch(6) }));
    assert!(!progress.connected);
    drop(shipper);
    assert!(ends.try_recv().is_err(), "there was no further connection");
}

#[test]
fn a_fork_is_seen_by_the_agent_too() {
    let (shipper, script, ends) = started(welcome(position(BEGIN)));
    let mut at = BEGIN;
    shipper.try_push(batch(&mut at, &[1, 1]), false).unwrap();
    drop(script);
    let _script = Script::accept(&ends, welcome(position((Sequence(1), ChainHash([3; 32])))));
    let progress = until(&shipper, |p| p.refusal.is_some());
    assert_eq!(progress.refusal, Some(Refusal::Fork { at: Sequence(1) }));
}

#[test]
fn a_busy_store_is_tried_again_but_not_at_the_start() {
    let busy = || Frame::Refused(Refusal::Busy { name: "g".into() });
    let (shipper, script, ends) = started(welcome(position(BEGIN)));
    drop(script);
    drop(Script::accept(&ends, busy()));
    let _script = Script::accept(&ends, welcome(position(BEGIN)));
    until(&shipper, |p| p.connected && p.reconnects == 1);

    let (connect, ends) = replayer();
    let starting = std::thread::spawn(move || Shipper::start(options(connect), None, None));
    let _script = Script::accept(&ends, busy());
    assert!(matches!(starting.join().unwrap(), Err(ShipError::Refused(Refusal::Busy { .. }))));
}

#[test]
fn a_catalogue_comes_in_parts_and_again_after_a_break() {
    let (shipper, mut script, ends) = started(welcome(position(BEGIN)));
    let asking = std::thread::spawn(move || (shipper.catalog(Duration::from_secs(10)), shipper));
    let object = |n| CatalogObject {
        object: ObjectId(n),
        identity: bfs_common::record::Identity::default(),
        kind: bfs_common::record::FileKind::Regular,
        device: 0,
        meta: bfs_common::record::Meta::default(),
        size: 0,
        xattrs: Vec::new(),
        target: bytes::Bytes::new(),
        entries: Vec::new(),
    };
    let asked = |script: &mut Script| {
        while !matches!(script.next().0, Frame::GetCatalog) {}
    };
    asked(&mut script);
    script.send(Frame::Catalog { objects: vec![object(9)], last: false });
    drop(script);
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    asked(&mut script);
    script.send(Frame::Catalog { objects: vec![object(1)], last: false });
    script.send(Frame::Catalog { objects: vec![object(2)], last: true });
    let (catalog, _shipper) = asking.join().unwrap();
    let numbers: Vec<_> = catalog.unwrap().iter().map(|o| o.object.0).collect();
    assert_eq!(numbers, [1, 2]);
}

#[test]
fn a_silent_peer_is_left() {
    let (shipper, script, _ends) = started(welcome(position(BEGIN)));
    let since = Instant::now();
    until(&shipper, |p| !p.connected);
    assert!(since.elapsed() < Duration::from_secs(6));
    assert!(shipper.progress().last_error.unwrap().contains("silent"));
    drop(script);
}

/// A spool of its own, and where it is.
fn spool(bytes_max: u64) -> (tempfile::TempDir, SpoolOptions, Spool) {
    let dir = tempfile::tempdir().unwrap();
    let options = SpoolOptions { directory: dir.path().into(), bytes_max, ..SpoolOptions::default() };
    let spool = Spool::open(options.clone(), Address::new("g", GroupId([1; 16]), [2; 16])).unwrap();
    (dir, options, spool)
}

fn started_with(spool: Spool) -> (Shipper, Script, mpsc::Receiver<Connection>) {
    let (connect, ends) = replayer();
    let starting = std::thread::spawn(move || Shipper::start(options(connect), Some(spool), None).unwrap());
    let (script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    (starting.join().unwrap().0, script, ends)
}

#[test]
fn what_a_destination_that_is_away_misses_is_kept_and_sent_when_it_is_back() {
    let (dir, _, spool) = spool(1 << 20);
    let (shipper, script, ends) = started_with(spool);
    drop(script);
    drop(Script::accept(&ends, Frame::Refused(Refusal::Busy { name: "g".into() })));
    let mut at = spooled(&shipper);
    let progress = shipper.progress();
    assert_eq!((progress.durable.sequence, progress.spool.records), (Sequence(0), 40));
    assert_eq!(progress.released_ring_position, Some(4000), "the ring is free for what is durable here");
    assert!(progress.spool.bytes > 20_000 && progress.spool.oldest.is_some());

    // It has some of it already: the middle of a batch.
    let mut known = BEGIN;
    batch(&mut known, &[500, 500]);
    batch(&mut known, &[500]);
    let (mut script, _) = Script::accept(&ends, welcome(position(known)));
    shipper.try_push(batch(&mut at, &[10]), false).unwrap();
    let mut next = known.0.0;
    while next < at.0.0 {
        for number in script.records() {
            next += 1;
            assert_eq!(number, next);
        }
    }
    script.ack(at);
    let progress = until(&shipper, |p| p.spool.records == 0 && p.spool.disk_bytes == 0);
    assert_eq!((progress.durable.sequence, progress.sealed, progress.retained_bytes), (at.0, at.0, 0));
    drop(shipper);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "an empty spool leaves nothing behind");
}

/// Pushes more than memory may hold, while the destination is away, and waits until all of it is in the spool.
fn spooled(shipper: &Shipper) -> (Sequence, ChainHash) {
    let mut at = BEGIN;
    for _ in 0..20 {
        let mut next = batch(&mut at, &[500, 500]);
        while let Err(Full(back)) = shipper.try_push(next, false) {
            next = back;
            let _ = shipper.wait_change(shipper.progress().version, Instant::now() + Duration::from_secs(1));
        }
    }
    until(shipper, |p| p.sealed == at.0);
    at
}

/// It is read from where the destination stands, which can take longer than a peer is silent before it counts as dead.
#[test]
fn heartbeats_go_on_while_the_spool_is_read() {
    let (_dir, _, spool) = spool(1 << 20);
    let log = spool.log().to_owned();
    let (shipper, script, ends) = started_with(spool);
    drop(script);
    drop(Script::accept(&ends, Frame::Refused(Refusal::Busy { name: "g".into() })));
    let at = spooled(&shipper);
    // Its segment cannot be opened before somebody writes to it.
    let segment = crate::log::segment_path(&log, 1);
    let aside = segment.with_extension("new");
    std::fs::rename(&segment, &aside).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &segment, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    for _ in 0..4 {
        match script.next() {
            (Frame::Ping(number), _) => script.send(Frame::Pong(number)),
            (other, _) => panic!("{other:?}"),
        }
    }
    let opened = std::fs::OpenOptions::new().write(true).open(&segment).unwrap();
    std::fs::rename(&aside, &segment).unwrap();
    drop((opened, script));
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    let mut last = 0;
    while last < at.0.0 {
        last = *script.records().last().unwrap();
    }
}

#[test]
fn what_an_agent_left_is_sent_in_its_epoch_and_a_fork_is_not() {
    for fork in [false, true] {
        let (_dir, options_of_spool, spool) = spool(1 << 20);
        let (shipper, script, _ends) = started_with(spool);
        drop(script);
        let mut at = BEGIN;
        let mut middle = BEGIN;
        shipper.try_push(batch(&mut at, &[10, 20]), false).unwrap();
        batch(&mut middle, &[10]);
        shipper.try_push(batch(&mut at, &[30]), false).unwrap();
        until(&shipper, |p| p.sealed == at.0);
        drop(shipper);

        let address = Address::new("g", GroupId([1; 16]), [2; 16]);
        let mut spool = Spool::open(options_of_spool, address).unwrap();
        let left = spool.left().unwrap().unwrap();
        assert_eq!(
            (left.begin.sequence, left.end, left.address.epoch),
            (Sequence(0), position(at), Epoch(5))
        );
        let (connect, ends) = replayer();
        let ship = ShipOptions { epoch: Some(left.address.epoch), ..options(connect) };
        let sending = std::thread::spawn(move || send_left(ship, spool, &left, |_| {}));
        if fork {
            middle.1 = ChainHash([7; 32]);
        }
        let (mut script, epoch) = Script::accept(&ends, welcome(position(middle)));
        assert_eq!(epoch, Some(Epoch(5)));
        if fork {
            let refused = sending.join().unwrap().unwrap_err();
            assert!(matches!(refused, ShipError::Refused(Refusal::Fork { at: Sequence(1) })), "{refused}");
            continue;
        }
        assert_eq!(script.records(), [2, 3]);
        script.ack(at);
        let (spool, progress) = sending.join().unwrap().unwrap();
        assert_eq!(progress.durable.sequence, at.0);
        assert!(spool.unwrap().left().unwrap().is_none());
    }
}

#[test]
fn a_spool_at_its_bound_says_so_and_memory_is_what_is_left() {
    let (_dir, _, spool) = spool(3000);
    let (shipper, script, ends) = started_with(spool);
    drop(script);
    let mut at = BEGIN;
    shipper.try_push(batch(&mut at, &[2000]), false).unwrap();
    let first = at;
    until(&shipper, |p| p.sealed == first.0);
    shipper.try_push(batch(&mut at, &[3000]), false).unwrap();
    let progress = until(&shipper, |p| p.spool.is_full);
    assert!(progress.spool.trouble.unwrap().contains("as much as it may"));
    assert_eq!(progress.sealed, first.0);
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    assert_eq!((script.records(), script.records()), (vec![1], vec![2]));
    script.ack(at);
    until(&shipper, |p| p.durable.sequence == at.0 && !p.spool.is_full && p.spool.trouble.is_none());
}

/// A spool that fails when it begins goes on from where the stream is by then.
#[test]
fn a_spool_that_could_not_begin_begins_later() {
    let (dir, _, spool) = spool(1 << 20);
    let (shipper, mut script, ends) = started_with(spool);
    // No segment can be made there.
    let log = dir.path().join("g/log");
    std::fs::remove_dir(&log).unwrap();
    std::fs::write(&log, "").unwrap();
    let mut at = BEGIN;
    shipper.try_push(batch(&mut at, &[10]), false).unwrap();
    assert_eq!(script.records(), [1]);
    drop(script);
    until(&shipper, |p| p.spool.trouble.is_some());
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    assert_eq!(script.records(), [1]);
    script.ack(at);
    until(&shipper, |p| p.durable.sequence == at.0);
    std::fs::remove_file(&log).unwrap();
    std::fs::create_dir(&log).unwrap();
    drop(script);
    shipper.try_push(batch(&mut at, &[10]), false).unwrap();
    until(&shipper, |p| p.sealed == at.0 && p.spool.trouble.is_none());
}

/// Records go packed where both sides want that, and plain where they get no smaller.
#[test]
fn records_go_packed_where_that_was_agreed_on() {
    let (connect, ends) = replayer();
    let sending = Sending { compress: true, ..Sending::default() };
    let ship = ShipOptions { sending, retain_bytes_max: 1 << 20, ..options(connect) };
    let starting = std::thread::spawn(move || Shipper::start(ship, None, None).unwrap());
    // An older replayer refuses what it does not know, and gets what it does.
    let bad = Frame::Refused(Refusal::Bad("array had incorrect length, expected 6".into()));
    let (script, _) = Script::accept(&ends, bad);
    drop(script);
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    let (shipper, _) = starting.join().unwrap();
    let mut at = BEGIN;
    shipper.try_push(batch(&mut at, &[1000; 3]), false).unwrap();
    assert_eq!(script.records(), [1, 2, 3]);
    assert!(!shipper.progress().compressed);
    // The next one may be newer.
    drop(script);
    let mut newer = welcome(position(BEGIN));
    if let Frame::Welcome { lz4, .. } = &mut newer {
        *lz4 = true;
    }
    let (mut script, _) = Script::accept(&ends, newer);
    let body = loop {
        match script.next() {
            (Frame::Ping(number), _) => script.send(Frame::Pong(number)),
            (Frame::Packed { first, count, plain_len }, body) => {
                assert_eq!((first.0, count), (1, 3));
                break unpack(&body, plain_len).unwrap();
            }
            (other, _) => panic!("{other:?}"),
        }
    };
    assert!(body.len() > 3000);
    until(&shipper, |p| p.compressed && p.wire_bytes < p.sent_bytes && p.sent_bytes == 2 * body.len() as u64);
    script.ack(at);
    until(&shipper, |p| p.durable.sequence == at.0);
}

/// With a limit a batch goes in pieces, as fast as may be; heartbeats do not wait for it.
#[test]
fn a_limit_holds_back_the_stream_alone() {
    let (connect, ends) = replayer();
    let sending = Sending { rate_limit: Some(RATE_MIN), ..Sending::default() };
    let ship = ShipOptions { sending, retain_bytes_max: 1 << 20, ..options(connect) };
    let starting = std::thread::spawn(move || Shipper::start(ship, None, None).unwrap());
    let (mut script, _) = Script::accept(&ends, welcome(position(BEGIN)));
    let (shipper, _) = starting.join().unwrap();
    let mut at = BEGIN;
    // Three pieces and a little: the fourth goes when three are paid for.
    let batch = batch(&mut at, &[8 << 10; 25]);
    let bytes = batch.bytes.len() as f64;
    shipper.try_push(batch, false).unwrap();
    let began = Instant::now();
    let (mut records, mut pings, mut pieces) = (0, 0, 0);
    while records < 25 {
        match script.next() {
            (Frame::Ping(number), _) => {
                pings += 1;
                script.send(Frame::Pong(number));
            }
            (Frame::Records { first, count }, body) => {
                assert!(body.len() <= 64 << 10 && first.0 == records + 1, "{} bytes", body.len());
                records += u64::from(count);
                pieces += 1;
            }
            (other, _) => panic!("{other:?}"),
        }
    }
    let least = (bytes - f64::from(64 << 10)) / RATE_MIN as f64 - 0.2;
    assert!(began.elapsed().as_secs_f64() >= least, "{:?}", began.elapsed());
    assert!(pieces >= 4 && pings >= 2, "{pieces} pieces, {pings} heartbeats");
    assert!(shipper.limit().unwrap().holds_back(1 << 20));
    script.ack(at);
    let progress = until(&shipper, |p| p.durable.sequence == at.0);
    assert!(!progress.held_back && progress.retained_bytes == 0, "{progress:?}");
}
