//! Whatever bytes come over the wire or stand in a log or a file of before-images: they are decoded or refused, in
//! bounded time and memory, without a panic.
//!
//! The targets are functions of bytes ([`targets`]); they are driven by mutations ([`mutate`]) of real frames,
//! segments and images, from a seed that is printed (`BFS_SEED`). Half of the inputs get right checksums again,
//! because else none would get further than these. A run of normal length takes some seconds, `BFS_LONG` ten
//! minutes for each target.

#[path = "fuzz/corpus.rs"]
mod corpus;
#[path = "fuzz/memory.rs"]
mod memory;
#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bfs_tests::random::{Random, printed_seed};

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

/// An input may take so long on a busy machine.
const HANGS: Duration = Duration::from_secs(20);

/// One input after another, until the time is over.
fn fuzz(
    name: &str,
    corpus: &[Vec<u8>],
    repair: fn(&mut [u8]),
    allowed: impl Fn(usize) -> usize,
    mut target: impl FnMut(&[u8]),
) {
    let time = if std::env::var_os("BFS_LONG").is_some() { 600 } else { 3 };
    let mut random = Random::new(printed_seed());
    // What nobody changed must be understood, and is what the mutations begin from.
    corpus.iter().for_each(|input| target(input));
    let (inputs, done) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = (0, Instant::now());
            while inputs.load(Ordering::Relaxed) != done.load(Ordering::Relaxed) {
                let now = inputs.load(Ordering::Relaxed);
                if now != last.0 {
                    last = (now, Instant::now());
                }
                if last.1.elapsed() > HANGS {
                    eprintln!("{name}: input {now} of this seed takes longer than {HANGS:?}");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let began = Instant::now();
        let mut wrong = None;
        while wrong.is_none() && began.elapsed() < Duration::from_secs(time) {
            let mut input = mutate::mutated(&mut random, corpus);
            if random.chance(50) {
                repair(&mut input);
            }
            memory::begin();
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| target(&input)));
            let peak = memory::peak();
            if result.is_err() {
                wrong = Some(format!("panicked at {} bytes: {}", input.len(), hex(&input)));
            } else if peak > allowed(input.len()) {
                wrong = Some(format!("took {peak} bytes for {}: {}", input.len(), hex(&input)));
            }
            inputs.fetch_add(1, Ordering::Relaxed);
        }
        done.store(inputs.load(Ordering::Relaxed), Ordering::Relaxed);
        println!("{name}: {} inputs", inputs.load(Ordering::Relaxed));
        if let Some(wrong) = wrong {
            panic!("{name}: {wrong}");
        }
    });
}

fn hex(bytes: &[u8]) -> String {
    let shown: String = bytes.iter().take(2000).map(|b| format!("{b:02x}")).collect();
    if bytes.len() > 2000 { shown + "..." } else { shown }
}

/// In memory if there is such a place: nothing of it has to last.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

#[test]
fn frames_of_anybody() {
    // Vectors of short things that are announced and do not come: serde reserves a megabyte at most for each.
    fuzz("wire", &corpus::frames(), mutate::repair_frames, |len| 40 * len + (8 << 20), targets::fuzz_wire);
}

#[test]
fn a_segment_of_the_log() {
    let dir = folder();
    // A segment is read by pieces of 4 MiB, and once more as a whole where it is torn.
    let allowed = |len| 40 * len + (24 << 20);
    fuzz("log", &corpus::segments(), mutate::repair_segment, allowed, |input| {
        targets::fuzz_log(dir.path(), input);
    });
}

#[test]
fn a_file_of_before_images() {
    let dir = folder();
    fuzz(
        "images",
        &corpus::images(),
        mutate::repair_images,
        |len| 40 * len + (8 << 20),
        |input| {
            targets::fuzz_images(dir.path(), input);
        },
    );
}
