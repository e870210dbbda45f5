//! An authority of certificates, made for a test.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;

/// Where everything of a test listens.
pub const HOST: &str = "127.0.0.1";

/// An authority, whose certificates lie in a folder of its own.
pub struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its private key, as files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Authority {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // Of its own name: else what another one has signed would not look foreign, but forged.
        params.distinguished_name.push(DnType::CommonName, format!("authority {}", rand::random::<u32>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    /// Its own certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A certificate for `host`, in files of this name; those that are there are replaced.
    pub fn issue(&self, name: &str, host: &str) -> Identity {
        self.write(name, CertificateParams::new(vec![host.to_owned()]).unwrap())
    }

    /// One that is valid no more.
    pub fn issue_expired(&self, name: &str, host: &str) -> Identity {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        self.write(name, params)
    }

    fn write(&self, name: &str, mut params: CertificateParams) -> Identity {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let file = |suffix: &str| self.folder.path().join(format!("{name}{suffix}"));
        // As a certificate manager does it: whole files, one after the other.
        let replace = |file: &Path, text: String| {
            let new = file.with_extension("new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, file).unwrap();
        };
        let identity = Identity { cert: file(".crt"), key: file(".key") };
        replace(&identity.cert, cert.pem());
        replace(&identity.key, key.serialize_pem());
        identity
    }
}

impl Identity {
    /// The flags of a server: `--PREFIXtls-cert`, `--PREFIXtls-key` and, of `authority`, `--PREFIXtls-ca`.
    pub fn flags(&self, prefix: &str, authority: Option<&Authority>) -> Vec<String> {
        let ca = authority.map(Authority::ca);
        let files = [("cert", Some(&self.cert)), ("key", Some(&self.key)), ("ca", ca.as_ref())];
        let present = files.into_iter().filter_map(|(flag, file)| Some((flag, file?)));
        present.flat_map(|(flag, file)| [format!("--{prefix}tls-{flag}"), file.display().to_string()]).collect()
    }
}
