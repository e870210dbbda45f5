//! The same tests with all security on: with `OVERFILL_TEST_SECURE` in the environment, clusters of tests speak mutual TLS and send a
//! token between their processes, and TLS at their doors.
//!
//! Clients stay as they are: what they connect to passes their bytes on by TLS.

use std::sync::{Arc, OnceLock};

use clap::Parser;
use overfill_transport::{PeerSecurity, PeerSecurityArgs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use crate::authority::{Authority, HOST};

/// What all clusters of this process are secured by.
pub struct Security {
    authority: Authority,
    /// Flags of every server.
    pub peer_flags: Vec<String>,
    /// Flags of routers.
    pub door_flags: Vec<String>,
    _token: tempfile::NamedTempFile,
}

/// What is wanted in this run of the tests, if it is.
pub fn wanted() -> Option<&'static Security> {
    static WANTED: OnceLock<Option<Security>> = OnceLock::new();
    WANTED.get_or_init(|| std::env::var_os("OVERFILL_TEST_SECURE").map(|_| Security::new())).as_ref()
}

/// Flags that every server of a test's cluster has.
pub fn peer_flags() -> Vec<String> {
    wanted().map(|security| security.peer_flags.clone()).unwrap_or_default()
}

/// Flags that the routers of a test's cluster have beside.
pub fn door_flags() -> Vec<String> {
    wanted().map(|security| security.door_flags.clone()).unwrap_or_default()
}

/// As a process of the cluster has it that has these flags of [`PeerSecurityArgs`].
pub fn peers(flags: &[String]) -> PeerSecurity {
    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        security: PeerSecurityArgs,
    }
    let flags = Flags::parse_from(["process"].into_iter().chain(flags.iter().map(String::as_str)));
    PeerSecurity::open(&flags.security).unwrap()
}

impl Security {
    fn new() -> Self {
        let authority = Authority::new();
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(token.path(), "0123456789abcdef0123456789abcdef").unwrap();
        let mut peer_flags = authority.issue("peer", HOST).flags("peer-", Some(&authority));
        peer_flags.extend(["--cluster-token-file".into(), token.path().display().to_string()]);
        let door_flags = authority.issue("door", HOST).flags("", None);
        Self { authority, peer_flags, door_flags, _token: token }
    }
}

/// Where clients without TLS reach the door at `address`: there, or at what passes their bytes on by TLS. Must be called inside a
/// tokio runtime, with which that ends.
pub fn without_tls(address: &str, grpc: bool) -> String {
    let Some(security) = wanted() else { return address.to_owned() };
    let listener = std::net::TcpListener::bind((HOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let (here, there) = (listener.local_addr().unwrap().to_string(), address.to_owned());
    let connector = connector(&security.authority, grpc);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (connector, there) = (connector.clone(), there.clone());
            tokio::spawn(async move {
                let stream = TcpStream::connect(there).await?;
                client.set_nodelay(true)?;
                stream.set_nodelay(true)?;
                let mut server = connector.connect(ServerName::try_from(HOST).unwrap(), stream).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    here
}

/// What connects by TLS to servers of `authority`, for gRPC or for HTTP/1.1.
pub fn connector(authority: &Authority, grpc: bool) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.ca()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![if grpc { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    TlsConnector::from(Arc::new(config))
}
