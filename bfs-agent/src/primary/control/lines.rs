//! Lines from a client, of which none can be too long, too slow or half a one without its being told.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// For a line to come to its end, once it has begun.
pub(super) const LINE_LIMIT: Duration = Duration::from_secs(30);

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line without its end. What comes last needs no end of its own.
    Whole(Vec<u8>),
    /// One that was longer than it may be; it is passed over.
    TooLong,
    /// It did not come to its end in time.
    TooSlow,
    /// The client says nothing more.
    End,
}

/// The lines of one connection.
pub(super) struct Lines<'a> {
    stream: &'a UnixStream,
    bytes_max: usize,
    have: Vec<u8>,
    /// The line that is being read is passed over.
    passes_over: bool,
}

impl<'a> Lines<'a> {
    pub(super) fn new(stream: &'a UnixStream, bytes_max: usize) -> Self {
        Self { stream, bytes_max, have: Vec::new(), passes_over: false }
    }

    /// The next line. Without a limit a client may be silent as long as it likes, but not in the midst of a line.
    pub(super) fn next(&mut self, limit: Option<Duration>) -> io::Result<Line> {
        let after = |limit: Duration| Instant::now() + limit;
        let mut deadline = limit.or((!self.have.is_empty()).then_some(LINE_LIMIT)).map(after);
        loop {
            if let Some(end) = self.have.iter().position(|b| *b == b'\n') {
                let rest = self.have.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.have, rest);
                line.pop();
                return Ok(self.done(line));
            }
            if self.have.len() > self.bytes_max {
                self.passes_over = true;
                self.have.clear();
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Line::TooSlow);
            }
            self.stream.set_read_timeout(left)?;
            let mut buffer = [0; 4096];
            match (&mut &*self.stream).read(&mut buffer) {
                Ok(0) if self.have.is_empty() && !self.passes_over => return Ok(Line::End),
                Ok(0) => {
                    let line = std::mem::take(&mut self.have);
                    return Ok(self.done(line));
                }
                Ok(read) => {
                    self.have.extend_from_slice(&buffer[..read]);
                    deadline.get_or_insert_with(|| after(LINE_LIMIT));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn done(&mut self, line: Vec<u8>) -> Line {
        if std::mem::take(&mut self.passes_over) || line.len() > self.bytes_max {
            Line::TooLong
        } else {
            Line::Whole(line)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_are_told_apart_and_long_ones_are_passed_over() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let long = "x".repeat(5_000);
        let sent = format!("a\n\n{long}\nb\n0123456789\n0123456789a\n{long}{long}\nlast");
        theirs.write_all(sent.as_bytes()).unwrap();
        drop(theirs);
        let mut lines = Lines::new(&ours, 10);
        let mut next = || lines.next(None).unwrap();
        let whole = |text: &str| Line::Whole(text.as_bytes().to_vec());
        for expected in [
            whole("a"),
            whole(""),
            Line::TooLong,
            whole("b"),
            whole("0123456789"),
            Line::TooLong,
            Line::TooLong,
            whole("last"),
            Line::End,
        ] {
            assert_eq!(next(), expected);
        }
    }

    #[test]
    fn half_a_line_has_a_limit_and_silence_has_the_one_that_is_given() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(&ours, 10);
        let limit = Some(Duration::from_millis(20));
        assert_eq!(lines.next(limit).unwrap(), Line::TooSlow);
        theirs.write_all(b"hal").unwrap();
        assert_eq!(lines.next(limit).unwrap(), Line::TooSlow);
        theirs.write_all(b"f\n").unwrap();
        assert_eq!(lines.next(limit).unwrap(), Line::Whole(b"half".to_vec()));
    }
}
