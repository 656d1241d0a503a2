//! Pairing: a key that is not known yet proves a token, once, and is known from then on.
//!
//! It has a protocol of its own in the TLS handshake, which a replayer speaks only while a token is out. The agent knows the
//! replayer's key from the token and says nothing to another one. What proves the token is bound to the connection:
//! ```text
//! agent      32 bytes   blake3::keyed_hash(proving key of the token, channel binding)
//! replayer    1 byte    how it went
//! ```

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::keys::peers::Paired;

/// Bytes of a proof.
pub const PROOF: usize = 32;

/// What proves a token on a connection.
#[must_use]
pub fn proof(proving_key: &[u8; 32], channel: &[u8; 32]) -> blake3::Hash {
    blake3::keyed_hash(proving_key, channel)
}

/// The agent's side.
///
/// # Errors
/// What the stream says, or an answer that is none.
pub async fn ask(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    proof: blake3::Hash,
) -> std::io::Result<Paired> {
    stream.write_all(proof.as_bytes()).await?;
    stream.flush().await?;
    match stream.read_u8().await? {
        0 => Ok(Paired::Done),
        1 => Ok(Paired::Unknown),
        2 => Ok(Paired::Expired),
        3 => Ok(Paired::Used),
        other => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, format!("answer {other}"))),
    }
}

/// The replayer's side: the proof that comes.
///
/// # Errors
/// What the stream says.
pub async fn listen(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<blake3::Hash> {
    let mut bytes = [0; PROOF];
    stream.read_exact(&mut bytes).await?;
    Ok(blake3::Hash::from_bytes(bytes))
}

/// The replayer's side: how it went.
///
/// # Errors
/// What the stream says.
pub async fn answer(stream: &mut (impl AsyncWrite + Unpin), paired: Paired) -> std::io::Result<()> {
    let byte = match paired {
        Paired::Done => 0,
        Paired::Unknown => 1,
        Paired::Expired => 2,
        Paired::Used => 3,
    };
    stream.write_u8(byte).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_answer_is_understood() {
        for paired in [Paired::Done, Paired::Unknown, Paired::Expired, Paired::Used] {
            let (mut a, mut b) = tokio::io::duplex(64);
            let sent = proof(&[1; 32], &[2; 32]);
            let replayer = async {
                assert_eq!(listen(&mut b).await.unwrap(), sent);
                answer(&mut b, paired).await.unwrap();
            };
            let (asked, ()) = tokio::join!(ask(&mut a, sent), replayer);
            assert_eq!(asked.unwrap(), paired);
        }
        assert_ne!(proof(&[1; 32], &[2; 32]), proof(&[1; 32], &[3; 32]), "it is of one connection");
    }

    #[tokio::test]
    async fn what_is_no_answer_is_none() {
        assert!(
            ask(&mut tokio::io::join(&b"\x09"[..], tokio::io::sink()), proof(&[0; 32], &[0; 32]))
                .await
                .is_err()
        );
        assert!(
            ask(&mut tokio::io::join(&b""[..], tokio::io::sink()), proof(&[0; 32], &[0; 32])).await.is_err()
        );
        assert!(listen(&mut &b"short"[..]).await.is_err());
    }
}
