//! What is done with bytes of anybody: as the daemons do it, as far as no disk but a scratch folder is touched.

use std::fs;
use std::path::Path;

use bfs_agent::backup::gate::Gate;
use bfs_agent::backup::images::{self, Blocks};
use bfs_agent::backup::kinds::Kinds;
use bfs_agent::backup::target::Target;
use bfs_agent::log::writer::LogWriter;
use bfs_agent::log::{LogError, LogRef, segment_path};
use bfs_common::codec;
use bfs_common::record::*;
use bfs_common::wire::*;
use bytes::Bytes;

use super::corpus::{FROM, GROUP};

/// Frames, one after another, and the records in them through the gate into a target state.
pub fn fuzz_wire(input: &[u8]) {
    let mut rest = Bytes::copy_from_slice(input);
    let mut gate = gate();
    let mut target = Target::default();
    while rest.len() >= FRAME_PREFIX {
        let prefix: [u8; 4] = rest[..4].try_into().expect("4 bytes");
        let Ok(len) = frame_len(prefix) else { return };
        assert!(len <= FRAME_MAX, "a frame of {len} bytes is let in");
        if len > rest.len() {
            return;
        }
        let Ok((frame, mut body)) = decode_frame(rest.split_to(len)) else { continue };
        let packed = if let Frame::Packed { plain_len, .. } = frame { Some(plain_len) } else { None };
        let again = encode_frame(&frame, &body);
        assert_eq!(decode_frame(again).expect("what was encoded is understood"), (frame, body.clone()));
        if let Some(plain_len) = packed {
            let Ok(plain) = unpack(&body, plain_len) else { continue };
            assert!(plain.len() <= PACK_MAX && plain.len() == plain_len as usize);
            body = plain;
        }
        while let Ok(Some(encoded)) = codec::take(&mut body) {
            let Ok((record, payload)) = encoded.decode() else { break };
            if gate.take(Epoch(1), &encoded, &record, &payload).is_ok() {
                // A range beyond the end of all files is refused there.
                let _ = target.fold(record, &payload, LogRef { segment: 1, offset: 0 });
            }
        }
    }
}

fn gate() -> Gate {
    Gate::new(Position::START, CheckpointId(0), ObjectId(0), Vec::new(), [0; 16], Kinds::default())
}

/// A log of this one segment is opened; what that leaves is opened again, the same.
pub fn fuzz_log(dir: &Path, input: &[u8]) {
    fs::write(segment_path(dir, 1), input).unwrap();
    let mut gate = gate();
    let mut records = 0;
    let first = LogWriter::open(dir, GROUP, Position::START, |found| {
        records += 1;
        let _ = gate.replay(&found.encoded, &found.record);
        Ok::<_, LogError>(())
    });
    let Ok((writer, _)) = first else { return };
    let durable = writer.durable();
    drop(writer);
    let mut again = 0;
    let second = LogWriter::open(dir, GROUP, Position::START, |_| {
        again += 1;
        Ok::<_, LogError>(())
    });
    let (writer, opened) = second.expect("what was opened once is opened again");
    assert_eq!((writer.durable(), again), (durable, records));
    assert!(opened.cut.is_none(), "it was cut already");
}

/// The lines are read, and the blocks that they speak of.
pub fn fuzz_images(dir: &Path, input: &[u8]) {
    fs::write(images::path(dir, FROM), input).unwrap();
    let mut blocks = Blocks::new(dir);
    let mut bytes = Vec::new();
    let _ = images::read(dir, GROUP, FROM, |_, block| {
        // One that is damaged is named.
        let _ = blocks.read(block, &mut bytes);
        Ok(())
    });
}
