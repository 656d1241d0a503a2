//! The bytes of frames, as they are written down in docs/format.md.

use super::*;

#[test]
fn what_is_encoded_is_decoded() {
    let frame = Frame::Records { first: Sequence(1), count: 2 };
    let bytes = encode_frame(&frame, b"body");
    let prefix = bytes[..4].try_into().unwrap();
    assert_eq!(frame_len(prefix).unwrap(), bytes.len());
    assert_eq!(decode_frame(bytes).unwrap(), (frame, Bytes::from_static(b"body")));
}

#[test]
fn golden_bytes() {
    let hex = |frame| encode_frame(&frame, b"").iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(hex(Frame::GetStatus), "0e0000000a000000a9476574537461747573");
    assert_eq!(hex(Frame::ReadKeys), "0d00000009000000a8526561644b657973");
    assert_eq!(
        hex(Frame::KeysRead { ended: 3 }),
        "100000000c00000081a84b6579735265616491 03".replace(' ', "")
    );
    assert_eq!(
        hex(Frame::Refused(Refusal::KeyChanged)),
        "18000000 14000000 81 a752656675736564 aa4b65794368616e676564".replace(' ', "")
    );
    let refusal = Refusal::NotAllowed { key: "K".into(), group: "g".into(), right: "write".into() };
    assert_eq!(
        hex(Frame::Refused(refusal)),
        "24000000 20000000 81 a752656675736564 81 aa4e6f74416c6c6f776564 93 a14b a167 a57772697465"
            .replace(' ', "")
    );
    let step = Frame::PromoteStep { group: "g".into(), history: [1; 16], stage: PromoteStage::Placing };
    let one = "01".repeat(16);
    assert_eq!(
        hex(step),
        format!("2f0000002b000000 81 ab50726f6d6f746553746570 93 a167 dc0010{one} a7706c6163696e67")
            .replace(' ', "")
    );
    let refusal = Refusal::Promoted { at: CheckpointId(7), since_ns: 1, host: "b".into() };
    assert_eq!(
        hex(Frame::Refused(refusal)),
        "1c000000 18000000 81 a752656675736564 81 a850726f6d6f746564 93 07 01 a162".replace(' ', "")
    );
    let put = |epoch, made_ns| Frame::PutProcess {
        group: "g".into(),
        epoch: Epoch(epoch),
        checkpoint: CheckpointId(7),
        made_ns,
    };
    assert_eq!(
        hex(put(2, None)),
        "15000000 11000000 81 aa50757450726f63657373 93 a167 02 07".replace(' ', "")
    );
    assert_eq!(
        hex(put(0, Some(9))),
        "16000000 12000000 81 aa50757450726f63657373 94 a167 00 07 09".replace(' ', "")
    );
    let blocks = Frame::ProcessBlocks { file: "a.img".into(), size: 300 };
    assert_eq!(
        hex(blocks),
        "1d000000 19000000 81 ad50726f63657373426c6f636b73 92 a5612e696d67 cd012c".replace(' ', "")
    );
    assert_eq!(hex(Frame::ProcessKept), "10000000 0c000000 ab50726f636573734b657074".replace(' ', ""));
    let newest = Frame::GetNewest { group: "g".into(), object: ObjectId(5), at_least: Sequence(9) };
    assert_eq!(hex(newest), "14000000 10000000 81 a94765744e6577657374 93 a167 05 09".replace(' ', ""));
    assert_eq!(hex(Frame::Bye), "08000000 04000000 a3427965".replace(' ', ""));
    assert_eq!(PREAMBLE, *b"bfs1\x04\0\0\0");
}

#[test]
fn strangers_are_told_apart() {
    assert_eq!(check_preamble(PREAMBLE), Ok(()));
    assert_eq!(check_preamble(*b"GET / HT"), Err(WireError::NotBfs));
    assert_eq!(check_preamble(*b"bfs1\x02\0\0\0"), Err(WireError::Version(2)));
}

#[test]
fn no_bytes_make_the_decoder_panic() {
    let good = encode_frame(&Frame::Ping(7), b"xyz");
    for cut in 0..good.len() {
        let _ = decode_frame(good.slice(..cut));
    }
    for bit in 0..good.len() * 8 {
        let mut flipped = good.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let _ = decode_frame(Bytes::from(flipped));
    }
    assert!(frame_len([0xff; 4]).is_err());
}
