//! Who may talk to whom: how processes of one cluster know each other ([`PeerSecurity`]: mutual TLS, a token, or both), and TLS of
//! a listener for others ([`ServerTls`]).
//!
//! **Invariant:** with either, a node serves nobody else: calls are answered, and KV caches taken, only from who has shown a
//! certificate of the cluster's authority, and sent the cluster's token.

mod tls;
mod token;
pub mod watched;

use std::net::SocketAddr;
use std::path::PathBuf;

use axum::Router as Routes;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::middleware::{Next, from_fn};
use axum::response::IntoResponse;
use clap::Args;
use rustls::pki_types::ServerName;
use tonic::Status;

pub(crate) use self::tls::ClientTls;
pub use self::tls::{Identity, ServerTls};
use self::token::ClusterToken;
pub use self::watched::Unusable;

/// How processes of the cluster know each other; every server has these flags, with the same values.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Security between processes")]
pub struct PeerSecurityArgs {
    /// This process's certificate (PEM, with its chain), which it shows to other processes of the cluster. It is read again when it
    /// changes, as are the two other files
    #[arg(long, env = "OVERFILL_PEER_TLS_CERT", requires_all = ["peer_tls_key", "peer_tls_ca"])]
    pub peer_tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "OVERFILL_PEER_TLS_KEY", requires_all = ["peer_tls_cert", "peer_tls_ca"])]
    pub peer_tls_key: Option<PathBuf>,
    /// Certificates of the authority (PEM) that every other process's certificate has to lead to, whichever of the two connects
    #[arg(long, env = "OVERFILL_PEER_TLS_CA", requires_all = ["peer_tls_cert", "peer_tls_key"])]
    pub peer_tls_ca: Option<PathBuf>,
    /// Name that a node's certificate has to be for, whatever its address is [default: the host of its address]
    #[arg(long, env = "OVERFILL_PEER_TLS_NAME", value_parser = parse_name, requires = "peer_tls_cert")]
    pub peer_tls_name: Option<ServerName<'static>>,
    /// File of the token that processes of the cluster send each other: one on a line. The first is sent, a second one is taken as
    /// well, while it is rotated. It is read again when it changes
    #[arg(long, env = "OVERFILL_CLUSTER_TOKEN_FILE")]
    pub cluster_token_file: Option<PathBuf>,
}

fn parse_name(text: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(text.to_owned()).map_err(|_| format!("'{text}' is neither a DNS name nor an IP address"))
}

/// How the processes of one cluster know each other. Clones share it; the default is that they do not.
#[derive(Clone, Default)]
pub struct PeerSecurity {
    tls: Option<PeerTls>,
    token: Option<ClusterToken>,
}

#[derive(Clone)]
struct PeerTls {
    server: ServerTls,
    client: ClientTls,
}

impl PeerSecurity {
    /// As the flags say.
    ///
    /// # Errors
    /// Where one of their files cannot be used.
    pub fn open(args: &PeerSecurityArgs) -> Result<Self, Unusable> {
        let tls = match (&args.peer_tls_cert, &args.peer_tls_key, &args.peer_tls_ca) {
            (Some(cert), Some(key), Some(ca)) => {
                let identity = Identity { cert: cert.clone(), key: key.clone() };
                let server = ServerTls::new(identity.clone(), Some(ca.clone()), true)?;
                Some(PeerTls { server, client: ClientTls::new(identity, ca.clone(), args.peer_tls_name.clone())? })
            }
            _ => None,
        };
        let token = args.cluster_token_file.clone().map(ClusterToken::of_file).transpose()?;
        Ok(Self { tls, token })
    }

    /// For a cluster that is one process: nobody else on the machine knows its token.
    ///
    /// # Errors
    /// None that a caller could meet.
    pub fn of_one_process() -> Result<Self, Unusable> {
        Ok(Self { tls: None, token: Some(ClusterToken::random()?) })
    }

    /// Whether processes know each other by nothing.
    pub fn is_open(&self) -> bool {
        self.tls.is_none() && self.token.is_none()
    }

    /// Says it once where whoever reaches `listening` is served, unless only this machine does.
    pub fn warn_where_open(&self, listening: SocketAddr) {
        if self.is_open() && !listening.ip().is_loopback() {
            tracing::warn!(
                %listening,
                "whoever reaches this node is served: --cluster-token-file or --peer-tls-cert, --peer-tls-key and --peer-tls-ca keep others out"
            );
        }
    }

    /// TLS of a node's listener.
    pub(crate) fn server_tls(&self) -> Option<ServerTls> {
        self.tls.as_ref().map(|tls| tls.server.clone())
    }

    pub(crate) fn client_tls(&self) -> Option<ClientTls> {
        self.tls.as_ref().map(|tls| tls.client.clone())
    }

    /// Adds what a node wants to see of whoever asks it.
    pub(crate) fn add_to(&self, headers: &mut HeaderMap) {
        if let Some(token) = &self.token {
            token.add_to(headers);
        }
    }

    /// Refuses requests that come without the token, but for those of gRPC's own services: health and reflection.
    pub(crate) fn guard(&self, routes: Routes) -> Routes {
        let Some(token) = self.token.clone() else { return routes };
        routes.layer(from_fn(move |request: Request, next: Next| {
            let known = request.uri().path().starts_with("/grpc.") || token.is_in(request.headers());
            async move {
                if known {
                    return next.run(request).await;
                }
                let why = "this node serves processes of its cluster alone, and what came has not the cluster's token: \
                           is --cluster-token-file the same everywhere?";
                Status::unauthenticated(why).into_http::<axum::body::Body>().into_response()
            }
        }))
    }
}
