//! TLS 1.3 between two keys that know each other.
//!
//! Each side shows a certificate that carries its key, and proves by the signature of the handshake that it has the private
//! one; that is checked by the provider's own functions. Whose key it is follows from its fingerprint alone: there is no
//! authority, no name, no date, no revocation list. Nothing is resumed, because a session that is resumed shows no
//! certificate, and a key that was revoked would come back by it. There is no TLS 1.2 in the program.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    ServerConfig, SignatureScheme,
};

use crate::keys::peers::Standing;
use crate::keys::{Fingerprint, HostKey};

/// The protocol that is asked for in the handshake: frames.
pub const FRAMES: &[u8] = b"bfs";
/// The protocol that is asked for in the handshake: pairing.
pub const PAIRING: &[u8] = b"bfs-pair/1";

/// A peer whose key is not one that may be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the key {0} is not known")]
pub struct UnknownKey(pub Fingerprint);

/// What a TLS handshake failed of, as far as the other side is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The peer has this key, and it is not the one that it should have.
    WrongKey(Fingerprint),
    /// The peer does not know our key.
    NotKnown,
    /// The peer knows our key, and has revoked it.
    Revoked,
    /// The peer does not speak what was asked for.
    NoSuchProtocol,
}

/// Why, if an error of a stream is one of TLS that says so.
#[must_use]
pub fn why(error: &std::io::Error) -> Option<Why> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            inner.downcast_ref::<UnknownKey>().map(|unknown| Why::WrongKey(unknown.0))
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateUnknown) => Some(Why::NotKnown),
        rustls::Error::AlertReceived(AlertDescription::CertificateRevoked) => Some(Why::Revoked),
        rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => Some(Why::NoSuchProtocol),
        _ => None,
    }
}

/// The key of the peer, of whom the handshake is complete.
#[must_use]
pub fn peer_key(connection: &rustls::CommonState) -> Option<Fingerprint> {
    fingerprint(connection.peer_certificates()?.first()?).ok()
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Result<Fingerprint, rustls::Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(Fingerprint::of_public_key(&parsed.subject_public_key_info()))
}

fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

/// What an agent says and asks for: the replayer has one of these keys.
///
/// # Errors
/// If the key cannot be used.
pub fn client_config(
    key: &HostKey,
    replayer: Vec<Fingerprint>,
    protocol: &[u8],
) -> Result<ClientConfig, rustls::Error> {
    let provider = provider();
    let pinned = Pinned { keys: replayer, algorithms: provider.signature_verification_algorithms };
    let (certificate, private) = key.parts();
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_client_auth_cert(vec![certificate], PrivateKeyDer::Pkcs8(private))?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// What a replayer says and asks for.
///
/// # Errors
/// If the key cannot be used.
pub fn server_config(
    key: &HostKey,
    who: impl Fn(Fingerprint) -> Standing + Send + Sync + 'static,
    protocol: &[u8],
) -> Result<ServerConfig, rustls::Error> {
    let provider = provider();
    let known = Known { who: Box::new(who), algorithms: provider.signature_verification_algorithms };
    let (certificate, private) = key.parts();
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(known))
        .with_single_cert(vec![certificate], PrivateKeyDer::Pkcs8(private))?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// There is no name in it that anybody looks at; TLS wants one.
#[must_use]
pub fn no_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// The peer is known by one of these keys.
#[derive(Debug)]
struct Pinned {
    keys: Vec<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let key = fingerprint(end_entity)?;
        if !self.keys.contains(&key) {
            return Err(unknown(key));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// The peer is known by what is said of its key.
struct Known {
    who: Box<dyn Fn(Fingerprint) -> Standing + Send + Sync>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Known {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let key = fingerprint(end_entity)?;
        match (self.who)(key) {
            Standing::Known => Ok(ClientCertVerified::assertion()),
            Standing::Revoked => Err(CertificateError::Revoked.into()),
            Standing::Unknown => Err(unknown(key)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

fn unknown(key: Fingerprint) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(UnknownKey(key)))).into()
}

/// TLS 1.2 is not compiled in, so nobody asks.
fn only_tls13() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}

/// Bytes that only the two ends of this connection can compute, and that are others on every connection.
///
/// # Errors
/// Before the handshake is complete.
pub fn channel_binding<T>(connection: &rustls::ConnectionCommon<T>) -> Result<[u8; 32], rustls::Error> {
    connection.export_keying_material([0; 32], b"EXPORTER-bfs-pairing", None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Folder;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    fn key() -> HostKey {
        let dir = tempfile::tempdir().unwrap();
        Folder::new(dir.path()).host_key().unwrap()
    }

    /// What agent and replayer say after a handshake and a byte from the replayer.
    async fn shake(
        client: ClientConfig,
        server: ServerConfig,
    ) -> (std::io::Result<()>, std::io::Result<Option<Fingerprint>>) {
        let (a, b) = tokio::io::duplex(1 << 16);
        let agent = async {
            let mut stream = TlsConnector::from(Arc::new(client)).connect(no_name(), a).await?;
            stream.read_u8().await?;
            Ok(())
        };
        let replayer = async {
            let mut stream = TlsAcceptor::from(Arc::new(server)).accept(b).await?;
            stream.write_u8(1).await?;
            stream.flush().await?;
            Ok(peer_key(stream.get_ref().1))
        };
        tokio::join!(agent, replayer)
    }

    #[tokio::test]
    async fn two_that_know_each_other_are_connected() {
        let (agent, replayer) = (key(), key());
        let known = agent.fingerprint();
        let client =
            client_config(&agent, vec![key().fingerprint(), replayer.fingerprint()], FRAMES).unwrap();
        let who = move |key| if key == known { Standing::Known } else { Standing::Unknown };
        let (a, r) = shake(client, server_config(&replayer, who, FRAMES).unwrap()).await;
        a.unwrap();
        assert_eq!(r.unwrap(), Some(known));
    }

    #[tokio::test]
    async fn each_other_case_is_told_by_name() {
        let (agent, replayer) = (key(), key());
        let client = |pinned: Fingerprint, protocol| client_config(&agent, vec![pinned], protocol).unwrap();
        let server = |standing| server_config(&replayer, move |_| standing, FRAMES).unwrap();
        let right = replayer.fingerprint();
        for (client, standing, wanted) in [
            (client(right, FRAMES), Standing::Unknown, Why::NotKnown),
            (client(right, FRAMES), Standing::Revoked, Why::Revoked),
            (client(agent.fingerprint(), FRAMES), Standing::Known, Why::WrongKey(right)),
            (client(right, PAIRING), Standing::Known, Why::NoSuchProtocol),
        ] {
            let (a, r) = shake(client, server(standing)).await;
            assert_eq!(why(&a.unwrap_err()), Some(wanted));
            assert!(r.is_err());
        }
        // The replayer can say whose key it was.
        let (_, r) = shake(client(right, FRAMES), server(Standing::Unknown)).await;
        assert_eq!(why(&r.unwrap_err()), Some(Why::WrongKey(agent.fingerprint())));
    }

    /// Whoever copies a certificate has not the private key.
    #[tokio::test]
    async fn a_certificate_without_its_key_is_of_no_use() {
        let (agent, replayer, thief) = (key(), key(), key());
        let mut client = client_config(&agent, vec![replayer.fingerprint()], FRAMES).unwrap();
        let stolen = agent.parts().0;
        let signs =
            rustls::crypto::ring::sign::any_supported_type(&PrivateKeyDer::Pkcs8(thief.parts().1)).unwrap();
        client.client_auth_cert_resolver =
            Arc::new(Shows(Arc::new(rustls::sign::CertifiedKey::new(vec![stolen], signs))));
        let (a, r) = shake(client, server_config(&replayer, |_| Standing::Known, FRAMES).unwrap()).await;
        assert!(a.is_err());
        let error = r.unwrap_err();
        let error = error.get_ref().unwrap().downcast_ref::<rustls::Error>().unwrap();
        assert_eq!(*error, rustls::Error::InvalidCertificate(CertificateError::BadSignature));
    }

    #[derive(Debug)]
    struct Shows(Arc<rustls::sign::CertifiedKey>);

    impl rustls::client::ResolvesClientCert for Shows {
        fn resolve(
            &self,
            _hints: &[&[u8]],
            _schemes: &[SignatureScheme],
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(self.0.clone())
        }

        fn has_certs(&self) -> bool {
            true
        }
    }
}
