//! `vramd limits`.

use std::collections::BTreeMap;

use vramd_api::client::Client;
use vramd_api::{Bytes, DeviceLimits, SetLimits, ShareLimits, ShareUse};

use crate::arguments::{Limit, LimitsArguments, Share};
use crate::error::CommandError;
use crate::output::{Output, table};

pub async fn limits(client: &Client, arguments: LimitsArguments, output: Output) -> Result<(), CommandError> {
    let Some(device) = &arguments.device else {
        return output.data(&client.limits().await?, |page| shown(&page.limits));
    };
    let before = client.device_limits(device).await?;
    let limits = if arguments.changes() {
        client.set_limits(device, &changed(&before, &arguments)).await?
    } else {
        before
    };
    for gone in &limits.evicted {
        output.say(&format!("{}/{} goes", gone.model, gone.component));
    }
    if limits.above_bytes > 0 && limits.evicted.is_empty() {
        output.say(&format!("{} above it are in use and stay", Bytes::show(limits.above_bytes)));
    }
    output.data(&limits, |limits| shown(std::slice::from_ref(limits)))
}

/// All limits of a device: the daemon sets them together.
fn changed(before: &DeviceLimits, arguments: &LimitsArguments) -> SetLimits {
    let lifted = |limit: Option<Limit>, old: Option<Bytes>| match limit {
        None => old,
        Some(Limit::Default) => None,
        Some(Limit::Bytes(bytes)) => Some(bytes),
    };
    let old = before.overridden.then(|| Bytes::new(before.limit_bytes)).flatten();
    SetLimits {
        limit_bytes: lifted(arguments.limit, old),
        soft_limit_bytes: lifted(arguments.soft, before.soft_limit_bytes.and_then(Bytes::new)),
        reserve_bytes: lifted(arguments.reserve, above_zero(before.reserve_bytes)),
        owners: shares(&before.owners, &arguments.owner),
        purposes: shares(&before.purposes, &arguments.purpose),
    }
}

fn shares<K: Ord + Clone>(before: &BTreeMap<K, ShareUse>, changes: &[Share<K>]) -> BTreeMap<K, ShareLimits> {
    let kept = |share: &ShareUse| ShareLimits {
        limit_bytes: share.limit_bytes.and_then(Bytes::new),
        reserve_bytes: above_zero(share.reserve_bytes),
    };
    let mut all: BTreeMap<K, ShareLimits> =
        before.iter().map(|(name, share)| (name.clone(), kept(share))).collect();
    for Share { name, limit, reserve } in changes {
        let share = ShareLimits { limit_bytes: *limit, reserve_bytes: *reserve };
        all.insert(name.clone(), share);
        if share == ShareLimits::default() {
            all.remove(name);
        }
    }
    all
}

fn above_zero(bytes: u64) -> Option<Bytes> {
    Bytes::new(bytes).filter(|bytes| bytes.get() > 0)
}

fn shown(all: &[DeviceLimits]) -> String {
    let none = || "-".to_owned();
    let size = |bytes: Option<u64>| bytes.map_or_else(none, Bytes::show);
    let rows = all.iter().flat_map(|limits| {
        let from = if limits.overridden { "a call" } else { "the configuration" };
        let device = [
            limits.device_id.to_string(),
            none(),
            Bytes::show(limits.limit_bytes),
            size(limits.soft_limit_bytes),
            size(Some(limits.reserve_bytes).filter(|bytes| *bytes > 0)),
            none(),
            from.to_owned(),
        ];
        let owners = limits.owners.iter().map(|(name, share)| (format!("owner {name}"), share));
        let purposes = limits.purposes.iter().map(|(name, share)| (format!("purpose {name}"), share));
        let shares = owners.chain(purposes).map(|(whose, share)| {
            [
                limits.device_id.to_string(),
                whose,
                size(share.limit_bytes),
                none(),
                size(Some(share.reserve_bytes).filter(|bytes| *bytes > 0)),
                Bytes::show(share.used_bytes),
                "a call".to_owned(),
            ]
        });
        std::iter::once(device).chain(shares).collect::<Vec<_>>()
    });
    table(["DEVICE", "OF", ">LIMIT", ">SOFT", ">RESERVE", ">USED", "FROM"], rows)
}
