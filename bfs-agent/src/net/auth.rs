//! Who talks, and which version: what comes before the first frame.
//!
//! Over TCP both sides have proven their keys by then (`tls`); over a unix socket the kernel says who the peer is. The
//! preamble of `bfs_common::wire` is the first that is read of a peer, and says which version it speaks. The replayer
//! speaks first: so an agent that was let in knows it, and one that was not has sent nothing that would be lost.

use bfs_common::wire::{Frame, Refusal, VERSION, WireError};

use super::frame::{FrameError, FrameReader, FrameWriter};

/// Whether a user may be the peer on a unix socket: root, or the one who runs this process.
#[must_use]
pub fn uid_is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The agent's side.
///
/// # Errors
/// [`FrameError`].
pub async fn greet_replayer(reader: &mut FrameReader, writer: &mut FrameWriter) -> Result<(), FrameError> {
    reader.preamble().await?;
    writer.preamble().await
}

/// The replayer's side. A peer of another version is told so before the error is returned.
///
/// # Errors
/// [`FrameError`].
pub async fn greet_agent(reader: &mut FrameReader, writer: &mut FrameWriter) -> Result<(), FrameError> {
    writer.preamble().await?;
    let greeted = reader.preamble().await;
    if let Err(FrameError::Wire(WireError::Version(theirs))) = greeted {
        let refusal = Refusal::Version { ours: VERSION as u32, theirs };
        writer.send(&Frame::Refused(refusal), b"").await?;
    }
    greeted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(stream: tokio::io::DuplexStream) -> (FrameReader, FrameWriter) {
        let (r, w) = tokio::io::split(stream);
        (FrameReader::new(Box::new(r)), FrameWriter::new(Box::new(w)))
    }

    #[tokio::test]
    async fn two_of_one_version_greet_each_other() {
        let (a, b) = tokio::io::duplex(64);
        let ((mut ar, mut aw), (mut rr, mut rw)) = (end(a), end(b));
        let (agent, replayer) = tokio::join!(greet_replayer(&mut ar, &mut aw), greet_agent(&mut rr, &mut rw));
        agent.unwrap();
        replayer.unwrap();
    }

    #[tokio::test]
    async fn another_version_is_refused_by_name() {
        use tokio::io::AsyncWriteExt;
        let (mut a, b) = tokio::io::duplex(4096);
        let (mut rr, mut rw) = end(b);
        a.write_all(b"bfs1\x63\0\0\0").await.unwrap();
        let error = greet_agent(&mut rr, &mut rw).await.unwrap_err();
        assert!(matches!(error, FrameError::Wire(WireError::Version(99))));
        let (mut ar, _aw) = end(a);
        ar.preamble().await.unwrap();
        let (frame, _) = ar.next().await.unwrap().unwrap();
        assert_eq!(frame, Frame::Refused(Refusal::Version { ours: VERSION as u32, theirs: 99 }));
    }
}
