//! Where a process spends its CPU, asked for while it serves: stacks of all its threads, a hundred times a second.

use std::collections::HashMap;
use std::fmt::Write;
use std::time::Duration;

use axum::extract::Query;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use pprof::{Frames, ProfilerGuardBuilder};
use serde::Deserialize;
use tokio::sync::Semaphore;

/// Samples a second, of all threads together; not a round number, so that it does not keep step with what it measures.
const FREQUENCY: i32 = 99;
/// Longest profile.
const LONGEST: Duration = Duration::from_secs(60);

/// The process has one timer for it.
static ONE_AT_A_TIME: Semaphore = Semaphore::const_new(1);

#[derive(Deserialize)]
struct Wanted {
    seconds: Option<u64>,
}

/// `GET …?seconds=10`: see [`respond`].
pub fn route<S: Clone + Send + Sync + 'static>() -> MethodRouter<S> {
    get(async |Query(Wanted { seconds }): Query<Wanted>| respond(Duration::from_secs(seconds.unwrap_or(10))).await)
}

/// Profiles this process for so long, and answers with its stacks, folded: a line each, from the outermost function to the
/// innermost with `;` between them, and how often it was seen. Speedscope, inferno and flamegraph.pl read it.
pub async fn respond(wanted: Duration) -> Response {
    if wanted.is_zero() || wanted > LONGEST {
        let most = LONGEST.as_secs();
        return (StatusCode::BAD_REQUEST, format!("a profile takes from 1 to {most} seconds: /profile?seconds=10\n")).into_response();
    }
    let Ok(_one) = ONE_AT_A_TIME.try_acquire() else {
        return (StatusCode::CONFLICT, "a profile is being taken: one at a time is\n").into_response();
    };
    match profile(wanted).await {
        Ok(folded) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], folded).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("no profile can be taken: {error}\n")).into_response(),
    }
}

async fn profile(wanted: Duration) -> Result<String, pprof::Error> {
    let guard = ProfilerGuardBuilder::default().frequency(FREQUENCY).build()?;
    tokio::time::sleep(wanted).await;
    // Names are looked up in the debug information, which takes a while.
    let report = tokio::task::spawn_blocking(move || guard.report().build()).await;
    report.map_err(|_| pprof::Error::CreatingError)?.map(|report| folded(&report.data))
}

fn folded(stacks: &HashMap<Frames, isize>) -> String {
    let mut lines: Vec<String> = stacks
        .iter()
        .map(|(stack, seen)| {
            let mut line = stack.thread_name.clone();
            for name in stack.frames.iter().rev().flat_map(|inlined| inlined.iter().rev()) {
                line.push(';');
                line.push_str(&name.name());
            }
            // A text grows without failing.
            let _ = write!(line, " {seen}");
            line
        })
        .collect();
    lines.sort_unstable();
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[inline(never)]
    fn turning_in_circles(until: &AtomicBool) -> u64 {
        let mut sum = 0_u64;
        while !until.load(Ordering::Relaxed) {
            sum = std::hint::black_box(sum.wrapping_mul(31) + 7);
        }
        sum
    }

    #[tokio::test]
    async fn what_takes_time_is_seen_and_a_second_profile_is_refused() {
        let done = Arc::new(AtomicBool::new(false));
        let until = done.clone();
        let busy = std::thread::Builder::new().name("busy".into()).spawn(move || turning_in_circles(&until)).unwrap();
        let (first, second) = tokio::join!(respond(Duration::from_secs(1)), async {
            tokio::task::yield_now().await;
            respond(Duration::from_secs(1)).await
        });
        done.store(true, Ordering::Relaxed);
        busy.join().unwrap();
        assert_eq!((first.status(), second.status()), (StatusCode::OK, StatusCode::CONFLICT));
        let body = axum::body::to_bytes(first.into_body(), 1 << 20).await.unwrap();
        let folded = String::from_utf8(body.to_vec()).unwrap();
        assert!(folded.lines().any(|line| line.starts_with("busy;") && line.contains("turning_in_circles")), "{folded}");
        assert_eq!(respond(Duration::from_secs(61)).await.status(), StatusCode::BAD_REQUEST);
    }
}
