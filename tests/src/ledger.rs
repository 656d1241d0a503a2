//! What numbered programs leave, and what must hold of it at every checkpoint.
//!
//! Each writer numbers its operations 1, 2, 3... and writes with each the highest number that it
//! has *seen* of every writer. At a checkpoint the operations of each writer are a prefix, and no
//! number that anybody has seen is missing. A cut that is not closed under seeing breaks the
//! second, whatever it does to the first.

/// One operation as found in a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its number, from 1.
    pub number: u64,
    /// Highest number seen of each writer, by writer.
    pub seen: Vec<u64>,
}

/// What is wrong with these operations (by writer, in the order found), as text.
#[must_use]
pub fn check(writers: &[Vec<Operation>]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (writer, operations) in writers.iter().enumerate() {
        for (index, operation) in operations.iter().enumerate() {
            if operation.number != index as u64 + 1 {
                wrong.push(format!("writer {writer}: number {} at place {}", operation.number, index + 1));
                break;
            }
        }
        for operation in operations {
            for (other, seen) in operation.seen.iter().enumerate() {
                let there = writers.get(other).map_or(0, |o| o.len() as u64);
                if *seen > there {
                    wrong.push(format!(
                        "writer {writer} saw operation {seen} of writer {other} before its {}, but the tree \
                         ends at {there}",
                        operation.number
                    ));
                }
            }
        }
    }
    wrong.truncate(20);
    wrong
}

/// `number seen,seen,...` padded with blanks to `len` bytes, newline included.
///
/// # Panics
/// If it does not fit.
#[must_use]
pub fn line(operation: &Operation, len: usize) -> String {
    let seen: Vec<String> = operation.seen.iter().map(u64::to_string).collect();
    let text = format!("{} {}", operation.number, seen.join(","));
    assert!(text.len() < len, "a line of {len} bytes is too short");
    format!("{text:<width$}\n", width = len - 1)
}

/// Reads lines of `len` bytes back. A last line that is torn or not a line is an error: a
/// checkpoint never holds half a write.
///
/// # Errors
/// What is not a line, as text.
pub fn parse(bytes: &[u8], len: usize) -> Result<Vec<Operation>, String> {
    let mut operations = Vec::new();
    for chunk in bytes.chunks(len) {
        let bad = || format!("torn or foreign line {:?}", String::from_utf8_lossy(chunk));
        if chunk.len() != len || chunk.last() != Some(&b'\n') {
            return Err(bad());
        }
        operations.push(parse_line(&String::from_utf8_lossy(chunk)).ok_or_else(bad)?);
    }
    Ok(operations)
}

/// Reads one line back, whatever its length.
#[must_use]
pub fn parse_line(text: &str) -> Option<Operation> {
    let (number, seen) = text.trim().split_once(' ')?;
    let seen = seen.split(',').map(|n| n.trim().parse().ok()).collect::<Option<Vec<u64>>>()?;
    Some(Operation { number: number.parse().ok()?, seen })
}
