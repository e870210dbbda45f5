//! A Kubernetes API server as far as it concerns EndpointSlices of one namespace: list, watch, bookmarks, 410 Gone, and what can go
//! wrong with it. It stands in for a real one, which is not to be had in tests.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use overfill_cluster::{CLUSTER_LABEL, PORT_NAME, ROLE_LABEL};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

/// Events that a watch may be behind.
const BEHIND: usize = 1024;

/// Namespace of all its objects.
pub const NAMESPACE: &str = "models";

/// What is said of an endpoint: its pod's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pod {
    /// Its readiness probe fails, or has not been asked yet.
    NotReady,
    /// It is ready.
    Ready,
    /// It was told to end.
    Terminating,
}

/// How the server behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    /// As it should.
    #[default]
    Well,
    /// It takes requests and answers nothing, and watches that are open hear nothing ever again, not even their end.
    Silent,
    /// Watches are not told what happens meanwhile.
    Loses,
    /// It refuses everything with 403: the Role is missing.
    Forbids,
}

/// The server. It ends with its last handle.
#[derive(Clone)]
pub struct ApiServer {
    state: Arc<Mutex<Store>>,
    /// `host:port`.
    address: String,
    _serving: Arc<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct Store {
    version: u64,
    slices: BTreeMap<String, Value>,
    /// What happened, in order, by version; what is older than the last compaction is gone.
    events: Vec<(u64, Value)>,
    compacted: u64,
    /// Open watches, by their number.
    watchers: BTreeMap<usize, mpsc::Sender<Result<Bytes, std::io::Error>>>,
    /// Those that were silenced: they stay open.
    deaf: Vec<mpsc::Sender<Result<Bytes, std::io::Error>>>,
    mood: Mood,
    lists: usize,
    watches: usize,
}

/// What a request says in its query.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    #[serde(default)]
    watch: Option<String>,
    #[serde(default)]
    label_selector: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    timeout_seconds: Option<u64>,
    #[serde(default)]
    allow_watch_bookmarks: Option<String>,
}

impl Asked {
    fn watches(&self) -> bool {
        self.watch.as_deref().is_some_and(|watch| watch != "false")
    }
}

impl ApiServer {
    /// Starts one with no objects.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state: Arc<Mutex<Store>> = Arc::default();
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices");
        let routes = Router::new().route(&path, get(answer)).with_state(state.clone());
        let serving = AbortOnDropHandle::new(tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() }));
        Self { state, address, _serving: Arc::new(serving) }
    }

    /// Writes a kubeconfig that leads here.
    pub fn write_kubeconfig(&self, file: &Path) {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "test", "user": {} }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test", "namespace": NAMESPACE } }],
        });
        std::fs::write(file, config.to_string()).unwrap();
    }

    /// A slice with one endpoint: it is new, or in place of the one of that name.
    pub fn put(&self, name: &str, role: &str, address: &str, pod: Pod) {
        let (host, port) = address.rsplit_once(':').unwrap();
        let (ready, serving, terminating) = match pod {
            Pod::NotReady => (false, false, false),
            Pod::Ready => (true, true, false),
            Pod::Terminating => (false, true, true),
        };
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": { "name": name, "namespace": NAMESPACE, "labels": { CLUSTER_LABEL: "test", ROLE_LABEL: role } },
            "addressType": "IPv4", "ports": [{ "name": PORT_NAME, "port": port.parse::<u16>().unwrap(), "protocol": "TCP" }],
            "endpoints": [{ "addresses": [host], "conditions": { "ready": ready, "serving": serving, "terminating": terminating } }],
        });
        let mut state = self.state();
        let kind = if state.slices.contains_key(name) { "MODIFIED" } else { "ADDED" };
        state.happens(kind, slice);
    }

    /// The slice is gone: its pod has ended, or has other labels now.
    pub fn remove(&self, name: &str) {
        let mut state = self.state();
        let slice = state.slices.get(name).cloned().unwrap();
        state.happens("DELETED", slice);
    }

    /// Behaves so from now on.
    pub fn set(&self, mood: Mood) {
        let mut state = self.state();
        state.mood = mood;
        if mood == Mood::Silent {
            let silenced = std::mem::take(&mut state.watchers);
            state.deaf.extend(silenced.into_values());
        }
    }

    /// Breaks off all watches.
    pub fn cut(&self) {
        self.state().watchers.clear();
    }

    /// Forgets what happened until now: a watch that begins from before gets 410 Gone.
    pub fn forget(&self) {
        let mut state = self.state();
        state.compacted = state.version;
        state.events.clear();
    }

    /// Tells all watches that are open that what they go on from is gone, and ends them.
    pub fn tell_gone(&self) {
        let mut state = self.state();
        state.tell(&json!({ "type": "ERROR", "object": status(410, "Expired", "too old resource version") }));
        state.watchers.clear();
    }

    /// Sends bookmarks to all watches.
    pub fn bookmark(&self) {
        let mut state = self.state();
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": { "resourceVersion": state.version.to_string() }
        });
        state.tell(&json!({ "type": "BOOKMARK", "object": object }));
    }

    /// How many lists and watches were asked for.
    pub fn asked(&self) -> (usize, usize) {
        let state = self.state();
        (state.lists, state.watches)
    }

    fn state(&self) -> MutexGuard<'_, Store> {
        self.state.lock().unwrap()
    }
}

impl Store {
    fn happens(&mut self, kind: &str, mut slice: Value) {
        self.version += 1;
        slice["metadata"]["resourceVersion"] = self.version.to_string().into();
        let name = slice["metadata"]["name"].as_str().unwrap().to_owned();
        if kind == "DELETED" {
            self.slices.remove(&name)
        } else {
            self.slices.insert(name, slice.clone())
        };
        let event = json!({ "type": kind, "object": slice });
        self.events.push((self.version, event.clone()));
        if self.mood != Mood::Loses {
            self.tell(&event);
        }
    }

    fn tell(&mut self, event: &Value) {
        self.watchers.retain(|_, watcher| watcher.try_send(Ok(line(event))).is_ok());
    }
}

fn line(event: &Value) -> Bytes {
    format!("{event}\n").into()
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code, "reason": reason, "message": message })
}

async fn answer(State(state): State<Arc<Mutex<Store>>>, Query(asked): Query<Asked>) -> Response {
    let mood = state.lock().unwrap().mood;
    match mood {
        Mood::Silent => std::future::pending().await,
        Mood::Forbids => {
            let message = "endpointslices.discovery.k8s.io is forbidden: User \"test\" cannot list resource \"endpointslices\"";
            return (StatusCode::FORBIDDEN, Json(status(403, "Forbidden", message))).into_response();
        }
        Mood::Well | Mood::Loses => {}
    }
    let wanted = format!("{CLUSTER_LABEL}=test,{ROLE_LABEL}");
    if asked.label_selector != wanted {
        return (StatusCode::BAD_REQUEST, Json(status(400, "BadRequest", "not the selector that was expected"))).into_response();
    }
    let mut store = state.lock().unwrap();
    if !asked.watches() {
        store.lists += 1;
        let items: Vec<&Value> = store.slices.values().collect();
        let metadata = json!({ "resourceVersion": store.version.to_string() });
        let list = json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "metadata": metadata, "items": items });
        return Json(list).into_response();
    }
    store.watches += 1;
    let from: u64 = asked.resource_version.parse().unwrap();
    if from < store.compacted {
        return (StatusCode::GONE, Json(status(410, "Expired", "too old resource version"))).into_response();
    }
    assert!(asked.allow_watch_bookmarks.as_deref() == Some("true"), "bookmarks spare the server lists");
    let (sender, receiver) = mpsc::channel(BEHIND);
    for (_, event) in store.events.iter().filter(|(version, _)| *version > from) {
        sender.try_send(Ok(line(event))).unwrap();
    }
    let number = store.watches;
    store.watchers.insert(number, sender);
    drop(store);
    let limit = Duration::from_secs(asked.timeout_seconds.expect("a watch has an end"));
    tokio::spawn(async move {
        tokio::time::sleep(limit).await;
        state.lock().unwrap().watchers.remove(&number);
    });
    Body::from_stream(ReceiverStream::new(receiver)).into_response()
}
