//! `overfill pull` from servers and registries that cut, lie, dawdle and refuse: each half gets its own files and no others, a file has
//! its name only when its sha256 is right, and what came once is not fetched again.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use overfill_model::{Device, Pair, ThreadPool};
use overfill_tests::authority::{Authority, HOST};
use overfill_tests::file_server::{Asked, FileServer, Reply, Sent, files};
use overfill_tests::processes::binary;
use overfill_tests::tiny::{self, Kind, TinyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;

const WEIGHTS: &str = "full/model.safetensors";
/// Exit status of what may be had later.
const LATER: Option<i32> = Some(75);

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// `overfill pull` with these arguments, as patient as tests are.
fn command(source: &str, to: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(binary("overfill"));
    command.args(["pull", source, "--to"]).arg(to).args(flags);
    command.env("OVERFILL_PULL_SILENCE", "1").env("OVERFILL_PULL_ATTEMPTS", "3").env("NO_PROXY", "127.0.0.1").stdin(Stdio::null());
    command
}

async fn pull(source: &str, to: &Path, flags: &[&str]) -> Output {
    let mut command = command(source, to, flags);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What of a pair is in a folder, but for what is under way.
fn there(folder: &Path) -> Vec<String> {
    files(folder).into_keys().filter(|name| !name.starts_with(".pull/")).collect()
}

/// A pair on a server that answers as `answer` says, given the request and what an honest one would answer.
async fn serve(pair: &TinyPair, answer: impl Fn(&Asked, Reply) -> Reply + Send + Sync + 'static) -> FileServer {
    let files = files(&pair.dir);
    FileServer::start(move |asked| {
        let honest = asked.path.strip_prefix("/pair/").and_then(|name| files.get(name)).map(|content| Reply::file(content, asked));
        answer(asked, honest.unwrap_or(Reply::status(404)))
    })
    .await
}

/// A pair, a folder to pull it into, and what `pair.json` has as sha256.
fn setting(kind: Kind, seed: u64) -> (TinyPair, TempDir, PathBuf, String) {
    let (pair, folder) = (tiny::pair(kind, seed), tempfile::tempdir().unwrap());
    let to = folder.path().join("to");
    let pin = sha256(&std::fs::read(pair.dir.join("pair.json")).unwrap());
    (pair, folder, to, pin)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_half_fetches_its_own_and_nothing_twice() {
    let (pair, folder, _, pin) = setting(Kind::Projection, 70);
    let server = serve(&pair, |_, honest| honest).await;
    let url = format!("{}/pair/", server.url);
    let text = ["pair.json", "tokenizer.json", "tokenizer_config.json"];
    let full = ["full/config.json", WEIGHTS, "projection.safetensors"];
    let decode = ["decode/config.json", "decode/model.safetensors"];
    let halves: [(&str, &[&str]); 4] = [("router", &[]), ("prefill", &full), ("decode", &decode), ("all", &[&full[..], &decode].concat())];
    for (half, own) in halves {
        let to = folder.path().join(half);
        let mut wanted: Vec<String> = text.iter().chain(own).map(|name| (*name).to_owned()).collect();
        wanted.sort();
        let done = pull(&url, &to, &["--half", half, "--sha256", &pin]).await;
        assert!(done.status.success(), "{}", said(&done));
        assert_eq!(there(&to), wanted);
        assert_eq!(server.paths(), wanted.iter().map(|name| format!("/pair/{name}")).collect::<Vec<_>>(), "{half}");
        // All is there: a pinned pair needs no server at all, one that is not its pair.json.
        assert!(pull(&url, &to, &["--half", half, "--sha256", &pin]).await.status.success());
        assert_eq!(server.paths(), [""; 0]);
        assert!(pull(&url, &to, &["--half", half]).await.status.success());
        assert_eq!(server.paths(), ["/pair/pair.json"]);
    }
    // What came can be loaded by those who wanted it.
    let (device, pool) = (Device::Cpu, ThreadPool::new(1, &[]).unwrap());
    let open = |half: &str| Pair::open(&folder.path().join(half)).unwrap();
    open("prefill").load_full(&device, &pool).unwrap();
    open("prefill").load_transform(&pool).unwrap();
    open("decode").load_decode(&device, &pool).unwrap();
    // Of the other half only what is missing comes, and what was damaged.
    let to = folder.path().join("prefill");
    std::fs::write(to.join("full/config.json"), "{}").unwrap();
    assert!(pull(&url, &to, &["--sha256", &pin]).await.status.success());
    let wanted: Vec<String> =
        ["decode/config.json", "decode/model.safetensors", "full/config.json"].map(|name| format!("/pair/{name}")).into();
    assert_eq!(server.paths(), wanted);
    // Who reads all of it again finds it right.
    assert!(pull(&url, &to, &["--sha256", &pin, "--reread"]).await.status.success());
    assert_eq!(server.paths(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_this_machine_is_a_source_too_and_its_list_can_be_written_later() {
    let (pair, folder, to, _) = setting(Kind::Identity, 71);
    let path = pair.dir.join("pair.json");
    let new = std::fs::read(&path).unwrap();
    // As an older version wrote it.
    let mut old: Value = serde_json::from_slice(&new).unwrap();
    old.as_object_mut().unwrap().remove("files");
    std::fs::write(&path, serde_json::to_vec_pretty(&old).unwrap()).unwrap();
    Pair::open(&pair.dir).unwrap().load_full(&Device::Cpu, &ThreadPool::new(1, &[]).unwrap()).unwrap();
    let source = format!("file://{}", pair.dir.display());
    let refused = pull(&source, &to, &[]).await;
    assert!(!refused.status.success() && said(&refused).contains("overfill seal"), "{}", said(&refused));
    let sealed = Command::new(binary("overfill")).arg("seal").arg(&pair.dir).output().unwrap();
    assert!(sealed.status.success());
    assert_eq!(std::fs::read(&path).unwrap(), new, "as the maker of the pair wrote it");
    assert_eq!(String::from_utf8(sealed.stdout).unwrap().trim(), sha256(&new));
    for (source, half) in [(source.as_str(), "decode"), (pair.dir.to_str().unwrap(), "all")] {
        let done = pull(source, &to, &["--half", half, "--sha256", &sha256(&new)]).await;
        assert!(done.status.success(), "{}", said(&done));
    }
    assert_eq!(there(&to), files(&pair.dir).into_keys().collect::<Vec<_>>());
    // Weights that are not the pair's are not sealed.
    std::fs::remove_file(pair.dir.join(WEIGHTS)).unwrap();
    std::fs::copy(pair.dir.join("decode/model.safetensors"), pair.dir.join(WEIGHTS)).unwrap();
    let refused = Command::new(binary("overfill")).arg("seal").arg(&pair.dir).output().unwrap();
    assert!(!refused.status.success() && said(&refused).contains("full model"), "{}", said(&refused));
    let refused = pull(pair.dir.to_str().unwrap(), &folder.path().join("other"), &[]).await;
    assert!(!refused.status.success() && said(&refused).contains("bytes"), "{}", said(&refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_gone_on_with() {
    let (pair, _folder, to, pin) = setting(Kind::Identity, 72);
    let content = files(&pair.dir)[WEIGHTS].clone();
    let half = content.len() / 2;
    let times = AtomicUsize::new(0);
    let server = serve(&pair, move |asked, honest| match asked.path.ends_with(WEIGHTS) {
        // Each answer brings a bit more and breaks, but for the last.
        true if times.fetch_add(1, Ordering::SeqCst) < 2 => honest.sent(Sent::Cut(half / 2)),
        _ => honest,
    })
    .await;
    let done = pull(&format!("{}/pair", server.url), &to, &["--half", "prefill", "--sha256", &pin]).await;
    assert!(done.status.success(), "{}", said(&done));
    let weights: Vec<Option<usize>> = server.asked().into_iter().filter(|a| a.path.ends_with(WEIGHTS)).map(|a| a.from).collect();
    assert_eq!(weights, [None, Some(half / 2), Some(half / 2 * 2)]);
    assert!(said(&done).contains("again in"), "{}", said(&done));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_was_killed_is_gone_on_with() {
    for ranges in [true, false] {
        let (pair, _folder, to, pin) = setting(Kind::Identity, 73);
        let content = files(&pair.dir)[WEIGHTS].clone();
        let half = content.len() / 2;
        let times = AtomicUsize::new(0);
        let whole = content.clone();
        let server = serve(&pair, move |asked, honest| match asked.path.ends_with(WEIGHTS) {
            true if times.fetch_add(1, Ordering::SeqCst) == 0 => honest.sent(Sent::Hangs(half)),
            true if !ranges => Reply::whole(200, &whole),
            _ => honest,
        })
        .await;
        let url = format!("{}/pair/pair.json", server.url);
        let mut first = command(&url, &to, &["--half", "prefill", "--sha256", &pin, "--silence", "60"]).spawn().unwrap();
        let partial = to.join(format!(".pull/{}.partial", sha256(&content)));
        let until = Instant::now() + Duration::from_secs(30);
        while partial.metadata().map_or(0, |m| m.len()) < half as u64 {
            assert!(Instant::now() < until, "what comes is written as it comes");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        first.kill().unwrap();
        first.wait().unwrap();
        assert!(!there(&to).contains(&WEIGHTS.to_owned()), "half a file has no name");
        server.asked();
        let done = pull(&url, &to, &["--half", "prefill", "--sha256", &pin]).await;
        assert!(done.status.success(), "{}", said(&done));
        assert_eq!(std::fs::read(to.join(WEIGHTS)).unwrap(), content);
        let weights: Vec<Option<usize>> = server.asked().into_iter().filter(|a| a.path.ends_with(WEIGHTS)).map(|a| a.from).collect();
        assert_eq!(weights, [Some(half)], "the rest alone is asked for");
        assert!(!partial.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_never_get_the_name() {
    let (pair, folder, _, pin) = setting(Kind::Identity, 74);
    let content = files(&pair.dir)[WEIGHTS].clone();
    let mut wrong = content.clone();
    wrong[1000] ^= 1;
    let (longer, shorter) = ([&content[..], b"x"].concat(), content[..content.len() - 1].to_vec());
    let cases: [(&str, Reply, &str); 5] = [
        ("wrong", Reply::whole(200, &wrong), "sha256"),
        ("longer", Reply::whole(200, &longer), "bytes"),
        ("shorter", Reply::whole(200, &shorter), "bytes"),
        ("endless", Reply::whole(200, &wrong).sent(Sent::Endless), "sha256"),
        ("a page", Reply::whole(200, b"<html>"), "bytes"),
    ];
    for (what, reply, why) in cases {
        let to = folder.path().join(what);
        let server = serve(&pair, move |asked, honest| if asked.path.ends_with(WEIGHTS) { reply.clone() } else { honest }).await;
        let failed = pull(&format!("{}/pair/", server.url), &to, &["--half", "prefill", "--sha256", &pin]).await;
        assert_eq!(failed.status.code(), Some(1), "{what}: {}", said(&failed));
        assert!(said(&failed).contains(why) && said(&failed).contains(WEIGHTS), "{what}: {}", said(&failed));
        assert!(!there(&to).contains(&WEIGHTS.to_owned()), "{what}");
        assert_eq!(server.asked().iter().filter(|a| a.path.ends_with(WEIGHTS)).count(), 1, "{what} is not asked for again");
    }
    // Half of it was another file's once: all of it is fetched anew, once.
    let to = folder.path().join("patched");
    std::fs::create_dir_all(to.join(".pull")).unwrap();
    std::fs::write(to.join(format!(".pull/{}.partial", sha256(&content))), vec![7; 1000]).unwrap();
    let server = serve(&pair, |_, honest| honest).await;
    let done = pull(&format!("{}/pair/", server.url), &to, &["--half", "prefill", "--sha256", &pin]).await;
    assert!(done.status.success(), "{}", said(&done));
    let weights: Vec<Option<usize>> = server.asked().into_iter().filter(|a| a.path.ends_with(WEIGHTS)).map(|a| a.from).collect();
    assert_eq!(weights, [Some(1000), None]);
    // A pair.json that is not the one that was pinned; one that leads out of the folder; a folder of another pair.
    let failed = pull(&format!("{}/pair/", server.url), &folder.path().join("b"), &["--sha256", &"0".repeat(64)]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains(&pin), "{}", said(&failed));
    let other = tiny::pair(Kind::Identity, 75);
    let failed = pull(other.dir.to_str().unwrap(), &to, &[]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("another pair"), "{}", said(&failed));
    let foreign = folder.path().join("foreign");
    std::fs::create_dir_all(&foreign).unwrap();
    std::fs::write(foreign.join("tokenizer.json"), "mine").unwrap();
    let failed = pull(other.dir.to_str().unwrap(), &foreign, &[]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("not this pair's"), "{}", said(&failed));
    assert_eq!(std::fs::read(foreign.join("tokenizer.json")).unwrap(), b"mine");
    let path = pair.dir.join("pair.json");
    let hostile = std::fs::read_to_string(&path).unwrap().replace("\"full/config.json\"", "\"../config.json\"");
    std::fs::write(&path, hostile).unwrap();
    let failed = pull(pair.dir.to_str().unwrap(), &folder.path().join("out"), &[]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("below the pair's own"), "{}", said(&failed));
    assert!(!folder.path().join("config.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_dawdles_is_not_waited_for() {
    let (pair, folder, _, pin) = setting(Kind::Identity, 76);
    for (what, sent) in [("silent", Sent::Hangs(0)), ("drips", Sent::Drips), ("stops", Sent::Hangs(5000))] {
        let server = serve(&pair, move |asked, honest| if asked.path.ends_with(WEIGHTS) { honest.sent(sent) } else { honest }).await;
        let (begun, to) = (Instant::now(), folder.path().join(what));
        let failed = pull(&format!("{}/pair/", server.url), &to, &["--half", "prefill", "--sha256", &pin]).await;
        assert_eq!(failed.status.code(), LATER, "{what}: {}", said(&failed));
        assert!(said(&failed).contains("came in 1 s") || said(&failed).contains("timed out"), "{what}: {}", said(&failed));
        assert!(begun.elapsed() < Duration::from_secs(15), "{what}: {:?}", begun.elapsed());
        assert_eq!(server.asked().iter().filter(|a| a.path.ends_with(WEIGHTS)).count(), 3, "{what}: --attempts");
    }
    // Nor for what is small.
    let server = serve(&pair, |_, honest| honest.sent(Sent::Drips)).await;
    let failed = pull(&format!("{}/pair/", server.url), &folder.path().join("small"), &[]).await;
    assert!(failed.status.code() == LATER && said(&failed).contains("pair.json: less than 16 KiB came in 1 s"), "{}", said(&failed));
    // Nobody there.
    let failed = pull("http://127.0.0.1:1/pair/", &folder.path().join("nobody"), &[]).await;
    assert_eq!(failed.status.code(), LATER, "{}", said(&failed));
    // Overloaded for a moment.
    let times = AtomicUsize::new(0);
    let server = serve(&pair, move |_, honest| match times.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::status(503).header("retry-after", "1"),
        1 => Reply::status(429),
        _ => honest,
    })
    .await;
    let done = pull(&format!("{}/pair/", server.url), &folder.path().join("overloaded"), &["--half", "router", "--sha256", &pin]).await;
    assert!(done.status.success(), "{}", said(&done));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_we_are_is_told_to_the_source_alone() {
    let (pair, folder, _, pin) = setting(Kind::Identity, 77);
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    for (status, hint) in [(401, "--auth-file"), (403, "may not read"), (404, "no such file")] {
        let server = serve(&pair, move |_, _| Reply::status(status)).await;
        let failed = pull(&format!("{}/pair/", server.url), &folder.path().join("no"), &[]).await;
        assert!(failed.status.code() == Some(1) && said(&failed).contains(hint), "{}", said(&failed));
        assert_eq!(server.asked().len(), 1, "what will not pass is not tried again");
    }
    // A source that sends us elsewhere, as stores of objects do: there nobody is told.
    let elsewhere = serve(&pair, |_, honest| honest).await;
    let away = elsewhere.url.clone();
    let source = FileServer::start(move |asked| Reply::status(307).header("location", format!("{away}{}", asked.path))).await;
    let url = format!("{}/pair/", source.url);
    let host = url.trim_start_matches("http://").split('/').next().unwrap();
    let token = file("token", "sesame\n");
    let logins = file("config.json", &json!({ "auths": { host: { "auth": "bWU6c2VjcmV0" } } }).to_string());
    for (flags, header) in [(["--token-file", &token], "Bearer sesame"), (["--auth-file", &logins], "Basic bWU6c2VjcmV0")] {
        let to = folder.path().join(&header[..5]);
        let done = pull(&url, &to, &[&flags[..], &["--half", "router", "--sha256", &pin]].concat()).await;
        assert!(done.status.success(), "{}", said(&done));
        assert!(source.asked().iter().all(|asked| asked.authorization.as_deref() == Some(header)));
        let asked = elsewhere.asked();
        assert!(asked.len() == 3 && asked.iter().all(|asked| asked.authorization.is_none()), "{asked:?}");
        assert!(!said(&done).contains("sesame") && !said(&done).contains("bWU6"), "{}", said(&done));
    }
    // In circles.
    let circle = FileServer::start(|asked| Reply::status(307).header("location", asked.path.clone())).await;
    let failed = pull(&format!("{}/pair/", circle.url), &folder.path().join("circle"), &[]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("on and on"), "{}", said(&failed));
    // A password in an argument is refused before anyone is asked.
    let refused = pull("https://me:secret@files.example/pair/", &folder.path().join("argument"), &[]).await;
    assert_eq!(refused.status.code(), Some(2));
    // By a proxy.
    let proxy = {
        let files = files(&pair.dir);
        FileServer::start(move |asked| Reply::file(&files[asked.path.strip_prefix("http://files.invalid/pair/").unwrap()], asked)).await
    };
    let mut command = command("http://files.invalid/pair/", &folder.path().join("proxy"), &["--half", "router", "--sha256", &pin]);
    command.env("HTTP_PROXY", &proxy.url);
    let done = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(done.status.success(), "{}", said(&done));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_authorities_that_are_named_are_trusted() {
    let (pair, folder, _, pin) = setting(Kind::Identity, 78);
    let authority = Authority::new();
    let identity = authority.issue("server", HOST);
    let cert = CertificateDer::from_pem_file(&identity.cert).unwrap();
    let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth().with_single_cert(vec![cert], key).unwrap();
    let content = files(&pair.dir);
    let plain = serve(&pair, |_, honest| honest).await;
    let away = format!("{}/pair/pair.json", plain.url);
    let answer = move |asked: &Asked| match asked.path.strip_prefix("/pair/") {
        Some(name) => Reply::file(&content[name], asked),
        None => Reply::status(307).header("location", away.clone()),
    };
    let server = FileServer::with_tls(answer, Some(TlsAcceptor::from(Arc::new(config)))).await;
    let (url, to) = (format!("{}/pair/", server.url), folder.path().join("to"));
    let failed = pull(&url, &to, &["--half", "router", "--sha256", &pin]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("--ca-file"), "{}", said(&failed));
    assert!(!said(&failed).contains("again in"), "another try will not help: {}", said(&failed));
    let ca = authority.ca();
    let done = pull(&url, &to, &["--half", "router", "--sha256", &pin, "--ca-file", ca.to_str().unwrap()]).await;
    assert!(done.status.success(), "{}", said(&done));
    // Who begins under TLS does not go on without.
    let failed = pull(&format!("{}/away/", server.url), &folder.path().join("away"), &["--ca-file", ca.to_str().unwrap()]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("from https to http"), "{}", said(&failed));
    assert_eq!(plain.asked(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_fetch_each_file_once() {
    let (pair, _folder, to, pin) = setting(Kind::Projection, 79);
    // Slow enough that all of them meet.
    let server = serve(&pair, |_, honest| {
        std::thread::sleep(Duration::from_millis(300));
        honest
    })
    .await;
    let url = format!("{}/pair/", server.url);
    let pulls = ["prefill", "decode", "prefill", "all", "decode"].map(|half| {
        let (url, to, pin) = (url.clone(), to.clone(), pin.clone());
        tokio::spawn(async move { pull(&url, &to, &["--half", half, "--sha256", &pin]).await })
    });
    for done in pulls {
        let done = done.await.unwrap();
        assert!(done.status.success(), "{}", said(&done));
    }
    let mut asked: BTreeMap<String, usize> = BTreeMap::new();
    for path in server.paths() {
        *asked.entry(path).or_default() += 1;
    }
    asked.remove("/pair/pair.json");
    assert!(asked.len() == 7 && asked.values().all(|times| *times == 1), "{asked:?}");
    assert_eq!(files(&pair.dir), files(&to).into_iter().filter(|(name, _)| !name.starts_with(".pull/")).collect());
    assert!(!files(&to).keys().any(|name| name.contains(".partial")));
}

/// A layer with files under `pair/`.
fn layer(files: &[(&str, &[u8])], packed: bool) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("pair/{name}"), *content).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    if !packed {
        return tar;
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    gzip.finish().unwrap()
}

/// A registry with these images, each a list of layers, that wants a token, which it gives to who knows the password.
async fn registry(images: Vec<(&'static str, Vec<Vec<u8>>)>) -> (FileServer, BTreeMap<&'static str, String>) {
    let (mut blobs, mut manifests, mut digests) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, layers) in images {
        let descriptor = |bytes: &[u8]| json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len() });
        let layers_said: Vec<Value> = layers.iter().map(|layer| descriptor(layer)).collect();
        let manifest = json!({ "schemaVersion": 2, "config": descriptor(b"{}"), "layers": layers_said }).to_string();
        blobs.extend(layers.into_iter().map(|layer| (format!("/v2/{name}/blobs/sha256:{}", sha256(&layer)), layer)));
        let digest = sha256(manifest.as_bytes());
        for reference in ["1".to_owned(), format!("sha256:{digest}")] {
            manifests.insert(format!("/v2/{name}/manifests/{reference}"), manifest.clone().into_bytes());
        }
        digests.insert(name, digest);
    }
    let server = FileServer::start(move |asked| {
        let path = asked.path.split('?').next().unwrap();
        match path {
            "/token" if asked.authorization.as_deref() == Some("Basic bWU6c2VjcmV0") && asked.path.contains("scope=repository%3A") => {
                Reply::whole(200, br#"{"token": "opened"}"#)
            }
            "/token" => Reply::status(401),
            _ if asked.authorization.as_deref() != Some("Bearer opened") => {
                let realm = format!("Bearer realm=\"http://{}/token\",service=\"here\",scope=\"repository:pair:pull\"", asked.host);
                Reply::status(401).header("www-authenticate", realm)
            }
            _ => manifests.get(path).or_else(|| blobs.get(path)).map_or(Reply::status(404), |content| Reply::file(content, asked)),
        }
    });
    (server.await, digests)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_a_registry_is_a_source_too() {
    let (pair, folder, _, pin) = setting(Kind::Projection, 80);
    let all = files(&pair.dir);
    let some = |begins: &[&str]| {
        all.iter()
            .filter(|(name, _)| begins.iter().any(|b| name.starts_with(b)))
            .map(|(n, c)| (n.as_str(), c.as_slice()))
            .collect::<Vec<_>>()
    };
    let (text, full) = (layer(&some(&["pair.json", "tokenizer"]), true), layer(&some(&["full", "projection"]), true));
    let whole = layer(&some(&[""]), false);
    // The layer below has nothing of ours, and in the last image pair.json comes after what it lists.
    let below = layer(&[], true);
    let images = vec![
        ("router", vec![below.clone(), text.clone()]),
        ("prefill", vec![below.clone(), text.clone(), full.clone()]),
        ("whole", vec![whole]),
        ("late", vec![full, text]),
        ("other", vec![below]),
    ];
    let (server, digests) = registry(images).await;
    let host = server.url.trim_start_matches("http://").to_owned();
    let logins = folder.path().join("config.json");
    std::fs::write(&logins, json!({ "auths": { &host: { "username": "me", "password": "secret" } } }).to_string()).unwrap();
    let known = ["--plain-http", "--auth-file", logins.to_str().unwrap()];
    let names = |names: &[(&str, &[u8])]| names.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    let prefill = names(&some(&["full", "pair.json", "projection", "tokenizer"]));
    for (name, half, wanted) in [
        ("router", "router", names(&some(&["pair.json", "tokenizer"]))),
        ("prefill", "prefill", prefill.clone()),
        ("whole", "all", names(&some(&[""]))),
        ("whole", "prefill", prefill.clone()),
        ("late", "prefill", prefill),
    ] {
        let to = folder.path().join(format!("{name}-{half}"));
        let image = format!("oci://{host}/{name}@sha256:{}", digests[name]);
        let done = pull(&image, &to, &[&known[..], &["--half", half, "--sha256", &pin]].concat()).await;
        assert!(done.status.success(), "{name}: {}", said(&done));
        assert_eq!(there(&to), wanted, "{name}");
        assert_eq!(files(&to).keys().filter(|name| name.contains(".partial")).count(), 0, "layers are not kept");
        server.asked();
        // It is all there, which the digest says even where pair.json is not pinned.
        assert!(pull(&image, &to, &[&known[..], &["--half", half]].concat()).await.status.success());
        assert_eq!(server.paths(), [""; 0]);
    }
    // By its tag, without a pin: what it is today is said, for who wants to pin it.
    let to = folder.path().join("tag");
    let done = pull(&format!("oci://{host}/router:1"), &to, &[&known[..], &["--half", "router"]].concat()).await;
    assert!(done.status.success() && said(&done).contains(&digests["router"]) && said(&done).contains(&pin), "{}", said(&done));
    let refuse = async |image: String, flags: &[&str], why: &str| {
        let failed = pull(&image, &folder.path().join("refused"), flags).await;
        assert!(failed.status.code() == Some(1) && said(&failed).contains(why), "{image}: {}", said(&failed));
    };
    refuse(format!("oci://{host}/router:1"), &[&known[..], &["--half", "decode"]].concat(), "the other half").await;
    refuse(format!("oci://{host}/other:1"), &known, "no /pair/pair.json").await;
    refuse(format!("oci://{host}/nothing:1"), &known, "404").await;
    refuse(format!("oci://{host}/router:1"), &["--plain-http"], "--auth-file").await;
    let other = format!("oci://{host}/router@sha256:{}", digests["whole"]);
    refuse(other, &known, "404").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_lies_is_found_out() {
    let (pair, folder, _, pin) = setting(Kind::Identity, 81);
    let all = files(&pair.dir);
    let layer = layer(&all.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect::<Vec<_>>(), true);
    let said_of = |bytes: &[u8], size: usize| {
        json!({ "layers": [{ "digest": format!("sha256:{}", sha256(bytes)), "size": size }] }).to_string().into_bytes()
    };
    let manifest = said_of(&layer, layer.len());
    let mut wrong = layer.clone();
    wrong[500] ^= 1;
    let digest = sha256(&manifest);
    let traversal = json!({ "layers": [{ "digest": "sha256:../../../etc/passwd", "size": 1 }] }).to_string().into_bytes();
    for (what, manifest, blob, reference, why) in [
        ("another manifest", said_of(&layer, 7), layer.clone(), format!("@sha256:{digest}"), "sha256"),
        ("another layer", manifest.clone(), wrong.clone(), format!("@sha256:{digest}"), "sha256"),
        ("a longer layer", manifest, [&layer[..], b"x"].concat(), format!("@sha256:{digest}"), "bytes"),
        ("a digest that is a path", traversal, layer, ":1".to_owned(), "has no sha256"),
        ("no manifest", b"<html>".to_vec(), wrong, ":1".to_owned(), "cannot be read"),
    ] {
        let server = FileServer::start(move |asked| match asked.path.contains("/manifests/") {
            true => Reply::whole(200, &manifest),
            false => Reply::file(&blob, asked),
        });
        let (server, to) = (server.await, folder.path().join(what));
        let image = format!("oci://{}/pair{reference}", server.url.trim_start_matches("http://"));
        let failed = pull(&image, &to, &["--plain-http", "--sha256", &pin]).await;
        assert!(failed.status.code() == Some(1) && said(&failed).contains(why), "{what}: {}", said(&failed));
        assert_eq!(there(&to), [""; 0], "{what}");
    }
    // One that goes on for ever is not kept in memory for ever.
    let server = FileServer::start(|_| Reply::whole(200, &[b' '; 1 << 16]).sent(Sent::Endless)).await;
    let image = format!("oci://{}/pair:1", server.url.trim_start_matches("http://"));
    let failed = pull(&image, &folder.path().join("endless"), &["--plain-http"]).await;
    assert!(failed.status.code() == Some(1) && said(&failed).contains("are not read"), "{}", said(&failed));
}
