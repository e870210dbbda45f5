//! A node's entry: a key under a lease, which is granted anew whenever it was lost.
//!
//! **Invariant:** as long as etcd answers, the entry is missing for no longer than a third of the lease's time and a pause,
//! whatever took it: a lease that ended, an etcd that was wiped, somebody who deleted the key.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use etcd_client::{Error, GetOptions, PutOptions};
use overfill_types::NodeInfo;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Etcd, LONGEST_PAUSE, within};
use crate::membership::key_of;
use crate::pause::pause;

/// Keeps `node` registered until `stop`. One that looks for others itself is registered once it watches them: whoever finds
/// it may send it to any of them, also when etcd goes away right then.
pub(crate) async fn hold(etcd: Arc<Etcd>, node: NodeInfo, watches: bool, stop: CancellationToken) {
    let key = key_of(&etcd.prefix(), &node);
    let value = match serde_json::to_string(&node) {
        Ok(value) => value,
        Err(error) => {
            tracing::error!(%error, "the node cannot be written as JSON");
            return;
        }
    };
    if watches {
        let mut watching = etcd.watching.subscribe();
        tokio::select! {
            () = stop.cancelled() => return,
            _ = watching.wait_for(|watching| *watching) => {}
        }
    }
    let mut failures = 0;
    loop {
        let mut registered = false;
        match hold_lease(&etcd, &key, &value, &stop, &mut registered).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(%key, %error, "registration lost: trying again"),
        }
        etcd.registered.store(false, Ordering::Relaxed);
        failures = if registered { 0 } else { failures + 1 };
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause(failures, LONGEST_PAUSE)) => {}
        }
    }
}

/// Registers under a new lease and keeps it alive; `Ok` after `stop`.
async fn hold_lease(etcd: &Etcd, key: &str, value: &str, stop: &CancellationToken, registered: &mut bool) -> Result<(), Error> {
    let ttl = etcd.settings.lease_ttl;
    let begin = async {
        let mut client = etcd.connect().await?;
        let lease = within(client.lease_grant(ttl.as_secs().max(1) as i64, None)).await?.id();
        within(client.put(key, value, Some(PutOptions::new().with_lease(lease)))).await?;
        let keeper = within(client.lease_keep_alive(lease)).await?;
        Ok::<_, Error>((client, lease, keeper))
    };
    let (mut client, lease, (mut keeper, mut answers)) = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        begun = begin => begun?,
    };
    *registered = true;
    etcd.registered.store(true, Ordering::Relaxed);
    tracing::info!(%key, lease, "registered");
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = sleep(ttl / 3) => {}
        }
        within(keeper.keep_alive()).await?;
        let alive = within(answers.message()).await?.is_some_and(|answer| answer.ttl() > 0);
        if !alive {
            return Err(Error::LeaseKeepAliveError(format!("lease {lease} has ended")));
        }
        // A key may go while its lease lives: by hand, or with an older lease whose late write came after ours.
        let there = within(client.get(key, Some(GetOptions::new().with_keys_only()))).await?;
        if there.kvs().first().is_none_or(|kv| kv.lease() != lease) {
            return Err(Error::LeaseKeepAliveError(format!("the key is gone from lease {lease}")));
        }
    }
    within(client.lease_revoke(lease)).await?;
    tracing::info!(%key, "withdrawn");
    Ok(())
}
