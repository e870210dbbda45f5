//! With TLS and a token a cluster serves its own alone: others are refused with a sentence, and what is renewed while it serves
//! costs no answer.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use overfill_lifecycle::Drain;
use overfill_proto::error::from_status;
use overfill_proto::v1::StatusRequest;
use overfill_proto::v1::inference_client::InferenceClient;
use overfill_proto::v1::node_client::NodeClient;
use overfill_tests::authority::{Authority, HOST, Identity};
use overfill_tests::cluster::{Builder, Cluster, request, tokens};
use overfill_tests::processes::{Etcd, Process, binary, eventually, free_port};
use overfill_tests::security::{connector, peers};
use overfill_tests::tiny::{self, Kind};
use overfill_transport::Connector;
use overfill_types::{Role, SamplingParams};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const PATIENCE: Duration = Duration::from_secs(30);
const OLD: &str = "0123456789abcdef-old";
const NEW: &str = "0123456789abcdef-new";
/// Longer than files are looked at.
const NOTICED: Duration = Duration::from_millis(1200);

fn strs(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

/// Flags of the token in `file`.
fn token_flags(file: &Path) -> Vec<String> {
    vec!["--cluster-token-file".into(), file.display().to_string()]
}

/// A client of the door at `address`, over a connection of its own.
async fn client(authority: &Authority, address: &str) -> Result<InferenceClient<Channel>, tonic::transport::Error> {
    let ca = Certificate::from_pem(std::fs::read(authority.ca()).unwrap());
    let tls = ClientTlsConfig::new().ca_certificate(ca);
    Ok(InferenceClient::new(Channel::from_shared(format!("https://{address}")).unwrap().tls_config(tls)?.connect().await?))
}

async fn answer(client: InferenceClient<Channel>, seed: u64) -> Result<Vec<u32>, Status> {
    let mut asked = request(&tiny::prompt(200, seed), &SamplingParams::greedy(), 200);
    asked.ignore_eos = true;
    tokens(client, asked).await
}

/// What a server at `address` shows.
async fn certificate(authority: &Authority, address: &str) -> Vec<u8> {
    let stream = TcpStream::connect(address).await.unwrap();
    let connected = connector(authority, true).connect(ServerName::try_from(HOST).unwrap(), stream).await.unwrap();
    connected.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_tokens_are_renewed_under_load_and_no_answer_fails() {
    let pair = tiny::pair(Kind::Identity, 5);
    let plain = Builder::new(&pair.dir).peer_flags(vec![]).start().await;
    let mut undisturbed = Vec::new();
    for seed in 0..8 {
        undisturbed.push(answer(plain.client().await, seed).await.unwrap());
    }
    drop(plain);

    let authority = Arc::new(Authority::new());
    let issue = |authority: &Authority| ["etcd", "door", "router", "prefill", "decode"].map(|name| authority.issue(name, HOST));
    let [of_etcd, door, router, prefill, decode] = issue(&authority);
    let Identity { cert, key } = &of_etcd;
    let ca = authority.ca();
    let files = [("--cert-file", cert), ("--key-file", key), ("--trusted-ca-file", &ca)];
    let tls = files.into_iter().flat_map(|(flag, file)| [flag.to_owned(), file.display().to_string()]);
    let etcd = Etcd::with_tls(tls.chain(["--client-cert-auth".to_owned()]).collect());
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), OLD).unwrap();

    let of_process = |own: &Identity| {
        let Identity { cert, key } = own;
        let mut flags = own.flags("peer-", Some(&authority));
        flags.extend(token_flags(token.path()));
        flags.extend(["--pair".into(), pair.dir.display().to_string(), "--etcd".into(), format!("https://{}", etcd.address)]);
        for (flag, file) in [("--etcd-ca", &authority.ca()), ("--etcd-cert", cert), ("--etcd-key", key)] {
            flags.extend([flag.to_owned(), file.display().to_string()]);
        }
        flags
    };
    let [http, grpc] = [(); 2].map(|()| format!("{HOST}:{}", free_port()));
    let mut flags = of_process(&router);
    flags.extend(door.flags("", None));
    flags.extend(["--http", &http, "--grpc", &grpc].map(str::to_owned));
    let _router = Process::ours("router", &strs(&flags));
    let node = |name: &str, own: &Identity| {
        let mut flags = of_process(own);
        flags.extend(["--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "32M"].map(str::to_owned));
        Process::ours(name, &strs(&flags))
    };
    let _nodes =
        [node("prefill-node", &prefill), node("prefill-node", &prefill), node("decode-node", &decode), node("decode-node", &decode)];
    let trusting = reqwest::Certificate::from_pem(&std::fs::read(authority.ca()).unwrap()).unwrap();
    let browser = reqwest::Client::builder().add_root_certificate(trusting).build().unwrap();
    let ready = || async { browser.get(format!("https://{http}/ready")).send().await.is_ok_and(|r| r.status().is_success()) };
    eventually(PATIENCE, "the cluster is ready", ready).await;
    assert!(reqwest::get(format!("http://{http}/ready")).await.is_err(), "nothing is said in the clear");

    let shown = certificate(&authority, &grpc).await;
    let done = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..8)
        .map(|seed| {
            let (authority, grpc, done) = (authority.clone(), grpc.clone(), done.clone());
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    answers.push(answer(client(&authority, &grpc).await.unwrap(), seed).await);
                }
                answers
            })
        })
        .collect();
    for tokens in [[OLD, NEW].join("\n"), [NEW, OLD].join("\n"), NEW.to_owned()] {
        issue(&authority);
        std::fs::write(token.path(), tokens).unwrap();
        tokio::time::sleep(NOTICED).await;
    }
    done.store(true, Ordering::Relaxed);
    for (task, undisturbed) in load.into_iter().zip(&undisturbed) {
        let answers = task.await.unwrap();
        assert!(answers.len() > 1, "the load went on while things were renewed");
        for answer in answers {
            assert_eq!(&answer.unwrap(), undisturbed);
        }
    }
    assert_ne!(certificate(&authority, &grpc).await, shown, "the door shows the new certificate");
    let added = node("decode-node", &decode);
    drop(_nodes);
    let after = answer(client(&authority, &grpc).await.unwrap(), 0).await;
    assert!(after.is_err(), "no prefill node is left: {after:?}");
    drop(added);
}

/// A cluster whose processes know each other by certificates and a token, and what they are made of.
struct Shut {
    cluster: Cluster,
    authority: Authority,
    right: Identity,
    token: tempfile::NamedTempFile,
}

async fn shut(pair: &Path) -> Shut {
    let (authority, token) = (Authority::new(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(token.path(), NEW).unwrap();
    let right = authority.issue("right", HOST);
    let flags = [right.flags("peer-", Some(&authority)), token_flags(token.path())].concat();
    let cluster = Builder::new(pair).peer_flags(flags).start().await;
    Shut { cluster, authority, right, token }
}

impl Shut {
    fn node(&self, role: Role) -> String {
        self.cluster.nodes(role)[0].address.to_string()
    }
}

/// Asks the node for its status as a process with these flags would; why it gets none.
async fn status(address: &str, flags: &[Vec<String>]) -> Result<(), String> {
    let channel = Connector::secured(peers(&flags.concat())).connect(address).unwrap();
    let asked = tokio::time::timeout(Duration::from_secs(5), NodeClient::new(channel).status(StatusRequest {})).await;
    asked.expect("it is refused, not left waiting").map(|_| ()).map_err(|status| from_status(&status, "the node").to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_by_nodes_with_a_sentence() {
    let pair = tiny::pair(Kind::Identity, 5);
    let shut = shut(&pair.dir).await;
    assert_eq!(answer(shut.cluster.client().await, 1).await.unwrap().len(), 200, "its own processes are served");

    let (stranger, old) = (Authority::new(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(old.path(), OLD).unwrap();
    let token = token_flags(shut.token.path());
    let right = shut.right.flags("peer-", Some(&shut.authority));
    // Shows a stranger's certificate, and trusts the right authority.
    let foreign = stranger.issue("foreign", HOST).flags("peer-", Some(&shut.authority));
    let distrusting = shut.right.flags("peer-", Some(&stranger));
    let expired = shut.authority.issue_expired("expired", HOST).flags("peer-", Some(&shut.authority));
    let misnamed = [right.clone(), vec!["--peer-tls-name".into(), "overfill".into()]].concat();
    for role in [Role::Prefill, Role::Decode] {
        let node = shut.node(role);
        assert_eq!(status(&node, &[right.clone(), token.clone()]).await, Ok(()));
        for (what, flags, why) in [
            ("the token is missing", [right.clone(), vec![]], "has not the cluster's token"),
            ("it is an old one", [right.clone(), token_flags(old.path())], "has not the cluster's token"),
            ("a certificate of another authority", [foreign.clone(), token.clone()], "UnknownCA"),
            ("a node of another authority", [distrusting.clone(), token.clone()], "UnknownIssuer"),
            ("a certificate that has expired", [expired.clone(), token.clone()], "CertificateExpired"),
            ("a node that is not the one that is meant", [misnamed.clone(), token.clone()], "not valid for name"),
            ("no TLS", [vec![], token.clone()], "the connection to the node failed"),
        ] {
            let refused = status(&node, &flags).await.expect_err(what);
            assert!(refused.contains(why), "{what}: {refused}");
        }
        // Who speaks TLS, and shows no certificate.
        let ca = Certificate::from_pem(std::fs::read(shut.authority.ca()).unwrap());
        let anonymous =
            Channel::from_shared(format!("https://{node}")).unwrap().tls_config(ClientTlsConfig::new().ca_certificate(ca)).unwrap();
        let refused = NodeClient::new(anonymous.connect_lazy()).status(StatusRequest {}).await.unwrap_err();
        // Its client may meet the end of the connection before it reads why.
        assert!(from_status(&refused, "the node").to_string().contains("the connection to the node failed"), "{refused:?}");
        // Probes need no token.
        let channel = Connector::secured(peers(&right)).connect(&node).unwrap();
        assert!(HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_nodes_do_not_know_says_so_and_a_cluster_that_knows_it_goes_on() {
    let pair = tiny::pair(Kind::Identity, 5);
    let shut = shut(&pair.dir).await;
    let (stranger, old) = (Authority::new(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(old.path(), OLD).unwrap();
    let right = shut.right.flags("peer-", Some(&shut.authority));
    let foreign = stranger.issue("foreign", HOST).flags("peer-", Some(&stranger));
    for (flags, why) in [
        ([right.clone(), token_flags(old.path())].concat(), "has not the cluster's token"),
        ([foreign, token_flags(shut.token.path())].concat(), "UnknownIssuer"),
    ] {
        let listener = async || TcpListener::bind((HOST, 0)).await.unwrap();
        let listeners = overfill_router::Listeners { http: listener().await, grpc: listener().await, admin: None };
        let at = listeners.grpc.local_addr().unwrap();
        let cli = overfill_router::config::Cli::parse_from(["router", "--pair", pair.dir.to_str().unwrap()]);
        let config = overfill_router::RouterConfig::new(cli.pair, cli.bounds);
        let discovery = shut.cluster.discovery.clone().secured(peers(&flags));
        let run = overfill_router::run(config, listeners, discovery, Drain::new());
        let _router = AbortOnDropHandle::new(tokio::spawn(async move { run.await.unwrap() }));
        let client = InferenceClient::connect(format!("http://{at}")).await.unwrap();
        let refused = answer(client, 1).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable, "it is not the client that is unknown: {refused:?}");
        assert!(refused.message().contains(why), "{refused:?}");
    }
    assert_eq!(answer(shut.cluster.client().await, 1).await.unwrap().len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_door_may_ask_clients_for_a_certificate() {
    let pair = tiny::pair(Kind::Identity, 5);
    let authority = Authority::new();
    let [http, grpc] = [(); 2].map(|()| format!("{HOST}:{}", free_port()));
    let mut flags = authority.issue("door", HOST).flags("", Some(&authority));
    flags.extend(["--pair", pair.dir.to_str().unwrap(), "--http", &http, "--grpc", &grpc, "--etcd", "127.0.0.1:1"].map(str::to_owned));
    let _router = Process::ours("router", &strs(&flags));
    let builder = || {
        let ca = reqwest::Certificate::from_pem(&std::fs::read(authority.ca()).unwrap()).unwrap();
        reqwest::Client::builder().add_root_certificate(ca)
    };
    let Identity { cert, key } = authority.issue("client", HOST);
    let pem = [std::fs::read(cert).unwrap(), std::fs::read(key).unwrap()].concat();
    let known = builder().identity(reqwest::Identity::from_pem(&pem).unwrap()).build().unwrap();
    let models = format!("https://{http}/v1/models");
    eventually(PATIENCE, "who shows a certificate is served", || async {
        known.get(&models).send().await.is_ok_and(|r| r.status().is_success())
    })
    .await;
    assert!(builder().build().unwrap().get(&models).send().await.is_err(), "who shows none is not");
    assert!(client(&authority, &grpc).await.is_err() || answer(client(&authority, &grpc).await.unwrap(), 1).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_told_user_and_password() {
    let pair = tiny::pair(Kind::Identity, 5);
    let etcd = Etcd::start();
    let post = async |path: &str, body: Value| {
        let sent = reqwest::Client::new().post(format!("http://{}/v3/{path}", etcd.address)).json(&body).send().await;
        sent.is_ok_and(|answer| answer.status().is_success())
    };
    eventually(PATIENCE, "etcd answers", || post("auth/role/add", json!({ "name": "root" }))).await;
    let prefix = "/overfill/default/";
    let range = json!({ "permType": "READWRITE", "key": STANDARD.encode(prefix), "range_end": STANDARD.encode("/overfill/default0") });
    for (path, body) in [
        ("auth/user/add", json!({ "name": "root", "password": "of root" })),
        ("auth/user/grant", json!({ "user": "root", "role": "root" })),
        ("auth/role/add", json!({ "name": "cluster" })),
        ("auth/role/grant", json!({ "name": "cluster", "perm": range })),
        ("auth/user/add", json!({ "name": "overfill", "password": "of ours" })),
        ("auth/user/grant", json!({ "user": "overfill", "role": "cluster" })),
        ("auth/enable", json!({})),
    ] {
        assert!(post(path, body).await, "{path}");
    }
    let folder = tempfile::tempdir().unwrap();
    let password = |text: &str| {
        let file = folder.path().join(text);
        std::fs::write(&file, format!("{text}\n")).unwrap();
        file.display().to_string()
    };
    let [http, grpc] = [(); 2].map(|()| format!("{HOST}:{}", free_port()));
    let (right, wrong) = (password("of ours"), password("of others"));
    let flags = |password| {
        ["--pair", pair.dir.to_str().unwrap(), "--etcd", &etcd.address, "--etcd-user", "overfill", "--etcd-password-file", password]
    };
    let node = ["--listen", "127.0.0.1:0", "--threads", "1", "--kv-memory", "32M"];
    let _router = Process::ours("router", &[&flags(&right)[..], &["--http", &http, "--grpc", &grpc]].concat());
    let _prefill = Process::ours("prefill-node", &[&flags(&right)[..], &node].concat());
    let decode = Process::ours("decode-node", &[&flags(&wrong)[..], &node].concat());
    let body = |http: String| async move {
        let answer = reqwest::get(format!("http://{http}/ready")).await.ok()?;
        answer.text().await.ok()
    };
    let says = |what: &'static str| {
        let http = http.clone();
        async move { body(http).await.is_some_and(|told| told.starts_with(what)) }
    };
    eventually(PATIENCE, "who knows the password is found", || says("no decode node")).await;
    tokio::time::sleep(NOTICED).await;
    assert!(says("no decode node").await, "who does not know it is not");
    drop(decode);
    let _decode = Process::ours("decode-node", &[&flags(&right)[..], &node].concat());
    eventually(PATIENCE, "all are found", || says("ready\n")).await;
    let client = InferenceClient::connect(format!("http://{grpc}")).await.unwrap();
    assert_eq!(answer(client, 1).await.unwrap().len(), 200);
}

#[test]
fn files_that_cannot_be_used_are_named_at_the_start() {
    let pair = tiny::pair(Kind::Identity, 5);
    let (authority, other) = (Authority::new(), Authority::new());
    let (one, two) = (authority.issue("one", HOST), other.issue("two", HOST));
    let text = |path: &Path| path.display().to_string();
    let (ca, cert, key, other_key) = (text(&authority.ca()), text(&one.cert), text(&one.key), text(&two.key));
    let told = |binary_name: &str, flags: &[&str]| {
        let mut command = Command::new(binary(binary_name));
        command.args(["--pair", pair.dir.to_str().unwrap()]).args(flags).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{flags:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let router = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--prefill-nodes", "127.0.0.1:1", "--decode-nodes", "127.0.0.1:1"];
    for (flags, named) in [
        (&["--tls-cert", "/none.pem", "--tls-key", &key][..], "/none.pem"),
        (&["--tls-cert", &cert, "--tls-key", &other_key], &other_key),
        (&["--tls-cert", &cert, "--tls-key", &cert], &cert),
        (&["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &key], &key),
        (&["--tls-cert", &cert], "--tls-key"),
        (&["--peer-tls-cert", &cert, "--peer-tls-key", &key], "--peer-tls-ca"),
        (&["--cluster-token-file", "/none"], "/none"),
        (&["--cluster-token-file", &ca], &ca),
    ] {
        let told = told("router", &[&router[..], flags].concat());
        assert!(told.contains(named) && !told.contains("panicked"), "{flags:?}: {told}");
    }
    for (flags, named) in [
        (&["--etcd", "https://127.0.0.1:1"][..], "--etcd-ca"),
        (&["--etcd", "ftp://127.0.0.1:1"], "ftp"),
        (&["--etcd", "127.0.0.1:1", "--etcd-ca", "/none"], "/none"),
        (&["--etcd", "127.0.0.1:1", "--etcd-user", "overfill"], "--etcd-password-file"),
        (&["--etcd", "127.0.0.1:1", "--etcd-user", "overfill", "--etcd-password-file", "/none"], "/none"),
    ] {
        let told = told("decode-node", &[&["--listen", "127.0.0.1:0"][..], flags].concat());
        assert!(told.contains(named), "{flags:?}: {told}");
    }
}
