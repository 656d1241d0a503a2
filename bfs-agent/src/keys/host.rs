//! The private key of a host: a file that only its owner can read, in a form that other tools know (PKCS#8 version 2, RFC 5958,
//! in PEM).
//!
//! The certificate that TLS asks for is made of it anew at each start. It carries the key and nothing else that anybody
//! looks at: no name, no date, no issuer counts.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ED25519, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::Fingerprint;

/// Longest file of a key that is read.
pub(super) const BYTES_MAX: u64 = 4096;

/// A private key, with the certificate that carries it.
pub struct HostKey {
    fingerprint: Fingerprint,
    key: PrivatePkcs8KeyDer<'static>,
    certificate: CertificateDer<'static>,
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HostKey").field(&self.fingerprint).finish()
    }
}

impl HostKey {
    /// A new key, and the text of its file.
    pub(super) fn generate() -> Result<(Self, String), String> {
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(|e| e.to_string())?;
        Ok((Self::of(&pair)?, pair.serialize_pem()))
    }

    /// The key of a file with this text.
    pub(super) fn from_text(text: &str) -> Result<Self, String> {
        let pair = KeyPair::from_pem(text).map_err(|e| e.to_string())?;
        if !pair.is_compatible(&PKCS_ED25519) {
            return Err("it is not a key of the kind Ed25519".into());
        }
        Self::of(&pair)
    }

    fn of(pair: &KeyPair) -> Result<Self, String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let certificate = params.self_signed(pair).map_err(|e| e.to_string())?;
        Ok(Self {
            fingerprint: Fingerprint::of_public_key(&pair.subject_public_key_info()),
            key: PrivatePkcs8KeyDer::from(pair.serialize_der()),
            certificate: certificate.der().clone(),
        })
    }

    /// Its name.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// For TLS: the certificate, and the private key.
    pub(crate) fn parts(&self) -> (CertificateDer<'static>, PrivatePkcs8KeyDer<'static>) {
        (self.certificate.clone(), self.key.clone_key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_same_after_it_was_written_and_read() {
        let (key, text) = HostKey::generate().unwrap();
        assert!(text.len() < BYTES_MAX as usize && text.starts_with("-----BEGIN PRIVATE KEY-----"));
        assert_eq!(HostKey::from_text(&text).unwrap().fingerprint(), key.fingerprint());
        assert_ne!(HostKey::generate().unwrap().0.fingerprint(), key.fingerprint());
        for bad in ["", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n", &text[..60]] {
            assert!(HostKey::from_text(bad).is_err(), "{bad}");
        }
        assert!(!format!("{key:?}").contains("PRIVATE"));
    }
}
