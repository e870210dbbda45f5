//! TLS of one side of a connection, by rustls. Its files are read again when they change: whoever connects from then on meets
//! the new certificate, and connections that stand stay.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::watched::{Unusable, Watched};

/// How long a peer that was refused is read on.
const LINGERS: Duration = Duration::from_millis(500);
/// Application protocols of a door for HTTP, and of one for gRPC alone.
const HTTP: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A certificate, its chain below it, and its private key, both as PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// File of the certificate, then of those that lead to the authority's.
    pub cert: PathBuf,
    /// File of its private key.
    pub key: PathBuf,
}

/// The side that accepts connections. Clones share it.
#[derive(Clone)]
pub struct ServerTls(Arc<Watched<Arc<ServerConfig>>>);

/// The side that connects. Clones share it.
#[derive(Clone)]
pub(crate) struct ClientTls {
    config: Arc<Watched<Arc<ClientConfig>>>,
    /// What the peer's certificate has to be for, whatever its address is.
    name: Option<ServerName<'static>>,
    /// Whether it shows a certificate.
    known: bool,
}

impl ServerTls {
    /// Shows `identity`; where `ca` is given, whoever connects has to show a certificate that it leads to.
    ///
    /// # Errors
    /// Where one of the files cannot be used.
    pub fn new(identity: Identity, ca: Option<PathBuf>, grpc: bool) -> Result<Self, Unusable> {
        let files = [&identity.cert, &identity.key].into_iter().chain(&ca).cloned().collect();
        let read = move || {
            let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(unlikely)?;
            let builder = match &ca {
                Some(ca) => {
                    let verifier = WebPkiClientVerifier::builder_with_provider(authorities(ca)?, provider()).build();
                    builder.with_client_cert_verifier(verifier.map_err(unlikely)?)
                }
                None => builder.with_no_client_auth(),
            };
            let (chain, key) = identity.read()?;
            let mut config = builder.with_single_cert(chain, key).map_err(|error| identity.unusable(&error))?;
            config.alpn_protocols = if grpc { &HTTP[..1] } else { &HTTP }.iter().map(|name| name.to_vec()).collect();
            Ok(Arc::new(config))
        };
        Ok(Self(Arc::new(Watched::new(files, read)?)))
    }

    /// Greets whoever has connected.
    ///
    /// # Errors
    /// Why the two do not come together.
    pub(crate) async fn accept(&self, stream: TcpStream) -> std::io::Result<server::TlsStream<TcpStream>> {
        match TlsAcceptor::from(self.0.current()).accept(stream).into_fallible().await {
            Ok(stream) => Ok(stream),
            Err((error, mut stream)) => {
                // The peer has been told why. Closed with bytes of its own unread, the connection would be reset, and the reason
                // lost on the way: it is read to its end, for a moment.
                let read = async {
                    let _ = stream.shutdown().await;
                    let mut ignored = [0; 1024];
                    while stream.read(&mut ignored).await.is_ok_and(|bytes| bytes > 0) {}
                };
                let _ = tokio::time::timeout(LINGERS, read).await;
                Err(error)
            }
        }
    }
}

impl ClientTls {
    /// Shows `identity`, and talks only to those that show a certificate that `ca` leads to: for `name`, or else for the host
    /// that is connected to.
    ///
    /// # Errors
    /// Where one of the files cannot be used.
    pub(crate) fn new(identity: Identity, ca: PathBuf, name: Option<ServerName<'static>>) -> Result<Self, Unusable> {
        let files = vec![identity.cert.clone(), identity.key.clone(), ca.clone()];
        let read = move || {
            let verifier = WebPkiServerVerifier::builder_with_provider(authorities(&ca)?, provider()).build().map_err(unlikely)?;
            let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(unlikely)?;
            let (chain, key) = identity.read()?;
            let config = builder.with_webpki_verifier(verifier).with_client_auth_cert(chain, key);
            let mut config = config.map_err(|error| identity.unusable(&error))?;
            config.alpn_protocols = vec![HTTP[0].to_vec()];
            Ok(Arc::new(config))
        };
        Ok(Self { config: Arc::new(Watched::new(files, read)?), name, known: true })
    }

    /// Talks to those whose certificate an authority of the system's vouches for, and shows none.
    ///
    /// # Errors
    /// Where there are none.
    pub(crate) fn of_system() -> Result<Self, Unusable> {
        let mut roots = RootCertStore::empty();
        // Those that cannot be read are as if they were not there.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(Unusable("this system has no certificates of authorities: name a file of them in SSL_CERT_FILE".into()));
        }
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(unlikely)?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![HTTP[0].to_vec()];
        let config = Arc::new(config);
        Ok(Self { config: Arc::new(Watched::new(Vec::new(), move || Ok(config.clone()))?), name: None, known: false })
    }

    /// Greets the peer at `host`.
    ///
    /// # Errors
    /// Why the two do not come together.
    pub(crate) async fn connect(&self, host: &str, stream: TcpStream) -> std::io::Result<client::TlsStream<TcpStream>> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(std::io::Error::other)?,
        };
        let mut stream = TlsConnector::from(self.config.current()).connect(name, stream).await?;
        if self.known {
            // TLS 1.3 lets a client be through before its certificate was looked at. A server of HTTP/2 speaks first, or says why not:
            // after a request was sent, why would be lost.
            stream.fill_buf().await?;
        }
        Ok(stream)
    }
}

impl Identity {
    fn read(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Unusable> {
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| {
            Unusable(format!(
                "the private key {} cannot be used: {error} (a key as PEM, without a password, is expected)",
                self.key.display()
            ))
        })?;
        Ok((certificates(&self.cert)?, key))
    }

    fn unusable(&self, error: &rustls::Error) -> Unusable {
        Unusable(format!("the certificate {} cannot be used with the private key {}: {error}", self.cert.display(), self.key.display()))
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let unusable = |what: String| Unusable(format!("the certificate {} cannot be used: {what} (PEM is expected)", file.display()));
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(unusable("there is none in it".into())),
        read => read.map_err(|error| unusable(error.to_string())),
    }
}

fn authorities(file: &Path) -> Result<Arc<RootCertStore>, Unusable> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots
            .add(certificate)
            .map_err(|error| Unusable(format!("{} holds what is no certificate of an authority: {error}", file.display())))?;
    }
    Ok(Arc::new(roots))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What depends on nothing but the code here and on authorities that are not there, which has been looked at before.
fn unlikely(error: impl std::error::Error) -> Unusable {
    Unusable(format!("TLS cannot be set up: {error}"))
}
