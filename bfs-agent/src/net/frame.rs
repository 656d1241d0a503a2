//! Frames over a byte stream: the I/O around `bfs_common::wire`.

use bfs_common::wire::{
    self, Frame, PREAMBLE, WireError, check_preamble, decode_frame, encode_frame, frame_len,
};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The receiving half of any stream.
pub type BoxRead = Box<dyn AsyncRead + Send + Unpin>;
/// The sending half of any stream.
pub type BoxWrite = Box<dyn AsyncWrite + Send + Unpin>;

/// Why a frame was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("the connection broke: {0}")]
    Io(#[from] std::io::Error),
    /// The bytes are not ours.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream ended inside a frame.
    #[error("the connection ended in the middle of a frame")]
    CutOff,
}

/// Reads frames.
pub struct FrameReader {
    inner: BoxRead,
    buffer: BytesMut,
}

impl std::fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameReader").field("buffered", &self.buffer.len()).finish_non_exhaustive()
    }
}

impl FrameReader {
    /// A reader for a peer that is known.
    #[must_use]
    pub fn new(inner: BoxRead) -> Self {
        Self { inner, buffer: BytesMut::new() }
    }

    /// The next frame and its body; `None` when the peer ended the stream between two frames.
    ///
    /// Cancel safe: bytes that were read stay in the buffer.
    ///
    /// # Errors
    /// [`FrameError`].
    pub async fn next(&mut self) -> Result<Option<(Frame, Bytes)>, FrameError> {
        if !self.fill(4).await? {
            return if self.buffer.is_empty() { Ok(None) } else { Err(FrameError::CutOff) };
        }
        let len = frame_len(self.buffer[..4].try_into().expect("4 bytes"))?;
        if !self.fill(len).await? {
            return Err(FrameError::CutOff);
        }
        Ok(Some(decode_frame(self.buffer.split_to(len).freeze())?))
    }

    /// Bytes that came of a frame that is not whole.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Reads to the end of the stream and drops what comes, without a look at it.
    pub async fn drain(&mut self) {
        loop {
            self.buffer.clear();
            self.buffer.reserve(16 << 10);
            if !matches!(self.inner.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
    }

    /// Reads and checks the other side's preamble.
    ///
    /// # Errors
    /// [`FrameError::Wire`] if it is of another protocol or version.
    pub async fn preamble(&mut self) -> Result<(), FrameError> {
        // A stranger may send fewer bytes than a preamble has and then wait for an answer: the
        // first that differs decides.
        for have in 1..=PREAMBLE.len() {
            if !self.fill(have).await? {
                return Err(FrameError::CutOff);
            }
            if have <= 4 && self.buffer[have - 1] != PREAMBLE[have - 1] {
                return Err(WireError::NotBfs.into());
            }
        }
        let theirs = self.buffer[..PREAMBLE.len()].try_into().expect("8 bytes");
        self.buffer.advance(PREAMBLE.len());
        Ok(check_preamble(theirs)?)
    }

    /// Whether the buffer holds at least `need` bytes now; false at the end of the stream.
    async fn fill(&mut self, need: usize) -> Result<bool, FrameError> {
        while self.buffer.len() < need {
            self.buffer.reserve((need - self.buffer.len()).max(16 << 10));
            if self.inner.read_buf(&mut self.buffer).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Writes frames. Every call ends with a flush.
pub struct FrameWriter {
    inner: BoxWrite,
}

impl std::fmt::Debug for FrameWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameWriter").finish_non_exhaustive()
    }
}

impl FrameWriter {
    /// A writer.
    #[must_use]
    pub fn new(inner: BoxWrite) -> Self {
        Self { inner }
    }

    /// Sends our preamble.
    ///
    /// # Errors
    /// If the stream fails.
    pub async fn preamble(&mut self) -> Result<(), FrameError> {
        self.inner.write_all(&wire::PREAMBLE).await?;
        Ok(self.inner.flush().await?)
    }

    /// Sends a frame with a body. Not cancel safe: a frame that was begun must be finished.
    ///
    /// # Errors
    /// If the stream fails.
    pub async fn send(&mut self, frame: &Frame, body: &[u8]) -> Result<(), FrameError> {
        self.inner.write_all(&encode_frame(frame, body)).await?;
        Ok(self.inner.flush().await?)
    }

    /// Ends the stream in this direction.
    ///
    /// # Errors
    /// If the stream fails.
    pub async fn shutdown(&mut self) -> Result<(), FrameError> {
        Ok(self.inner.shutdown().await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(bytes: &'static [u8]) -> FrameReader {
        FrameReader::new(Box::new(bytes))
    }

    #[tokio::test]
    async fn a_stranger_is_told_apart_by_its_first_bytes() {
        let error = reader(b"GET").preamble().await.unwrap_err();
        assert!(matches!(error, FrameError::Wire(WireError::NotBfs)));
        let error = reader(b"bfs1\x09\0\0\0").preamble().await.unwrap_err();
        assert!(matches!(error, FrameError::Wire(WireError::Version(9))));
        assert!(matches!(reader(b"bfs1").preamble().await.unwrap_err(), FrameError::CutOff));
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let error = reader(b"\xff\xff\xff\0").next().await.unwrap_err();
        assert!(matches!(error, FrameError::Wire(WireError::TooLong(_))));
        assert!(matches!(reader(b"\x20\0\0\0abc").next().await.unwrap_err(), FrameError::CutOff));
    }
}
