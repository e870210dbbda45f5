//! How etcd is known, and knows us: TLS, a certificate of ours, user and password.

use std::fs;
use std::path::{Path, PathBuf};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use overfill_transport::security::Unusable;

/// Files that are read for each connection to etcd: what is renewed is taken with the next one.
#[derive(Clone, Debug, Default)]
pub struct EtcdSecurity {
    /// Authority of etcd's certificate: with it TLS is spoken.
    pub ca: Option<PathBuf>,
    /// Certificate that is shown, and its private key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User, and the file of its password.
    pub user: Option<(String, PathBuf)>,
}

impl EtcdSecurity {
    /// Reads all files once.
    ///
    /// # Errors
    /// Where one cannot be used.
    pub fn check(&self) -> Result<(), Unusable> {
        self.add_to(ConnectOptions::new()).map(|_| ())
    }

    /// Adds it to how etcd is connected to.
    ///
    /// # Errors
    /// Where a file cannot be used.
    pub(crate) fn add_to(&self, mut options: ConnectOptions) -> Result<ConnectOptions, Unusable> {
        if let Some(ca) = &self.ca {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("etcd's authority", ca)?));
            if let Some((cert, key)) = &self.identity {
                tls = tls.identity(Identity::from_pem(read("the certificate for etcd", cert)?, read("the private key for etcd", key)?));
            }
            options = options.with_tls(tls);
        }
        if let Some((user, file)) = &self.user {
            options = options.with_user(user, read("the password for etcd", file)?.trim_end_matches(['\r', '\n']));
        }
        Ok(options)
    }
}

fn read(what: &str, file: &Path) -> Result<String, Unusable> {
    fs::read_to_string(file).map_err(|error| Unusable(format!("{what} cannot be read from {}: {error}", file.display())))
}
