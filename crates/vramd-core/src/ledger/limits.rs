//! Limits and reserves: of a device, and of owners and purposes on it.
//!
//! A limit is the most that somebody may have, a reserve what nobody else can take from them. What is held when they are set stays.

use std::sync::Arc;

use vramd_api::{AllocationId, Bytes, DeviceId, DeviceLimits, OwnerName, SetLimits, ShareLimits, ShareUse};

use super::book::Book;
use super::{Allocation, Allocations, Ledger, Request};

/// How requests stand to the limits and reserves of a device's owners and purposes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Standing {
    /// Bytes above the limits of their own owners and purposes.
    pub above: u64,
    /// The same, of the limit of all models: other models may go for that.
    pub above_models: u64,
    /// What others have in reserve.
    pub kept: u64,
}

/// Whom a limit is of.
#[derive(Debug, Clone, Copy)]
enum Party<'a> {
    Owner(&'a str),
    /// `name*` is all that begin so.
    Purpose(&'a str),
}

impl Party<'_> {
    fn has(self, request: &Request) -> bool {
        match self {
            Self::Owner(name) => request.owner.as_str() == name,
            Self::Purpose(pattern) => match pattern.strip_suffix('*') {
                Some(prefix) => request.purpose.starts_with(prefix),
                None => request.purpose == pattern,
            },
        }
    }
}

/// The limits of a device: a cheap copy.
#[derive(Debug, Clone)]
pub struct Limits {
    set: Arc<SetLimits>,
    limit_bytes: u64,
    above_bytes: u64,
}

impl Limits {
    /// With what is used of them: it walks all allocations, if an owner or a purpose has limits.
    pub fn to_api(&self, device: &DeviceId, allocations: &Allocations) -> DeviceLimits {
        let shown = |party: Party<'_>, share: &ShareLimits| ShareUse {
            limit_bytes: share.limit_bytes.map(Bytes::get),
            reserve_bytes: share.reserve_bytes.map_or(0, Bytes::get),
            used_bytes: used_by(allocations, device, party),
        };
        let owner = |name: &OwnerName, share| shown(Party::Owner(name.as_str()), share);
        let set = &self.set;
        DeviceLimits {
            device_id: device.clone(),
            limit_bytes: self.limit_bytes,
            overridden: set.limit_bytes.is_some(),
            soft_limit_bytes: set.soft_limit_bytes.map(Bytes::get),
            reserve_bytes: set.reserve_bytes.map_or(0, Bytes::get),
            owners: set.owners.iter().map(|(name, share)| (name.clone(), owner(name, share))).collect(),
            purposes: set
                .purposes
                .iter()
                .map(|(name, share)| (name.clone(), shown(Party::Purpose(name), share)))
                .collect(),
            above_bytes: self.above_bytes,
            evicted: Vec::new(),
        }
    }
}

fn used_by(allocations: &Allocations, device: &DeviceId, party: Party<'_>) -> u64 {
    let here = allocations.values().filter(|it| it.device == *device);
    here.filter(|it| party.has(&it.request)).map(|it| it.block_bytes).sum()
}

fn parties(limits: &SetLimits) -> impl Iterator<Item = (Party<'_>, &ShareLimits)> {
    let owners = limits.owners.iter().map(|(name, share)| (Party::Owner(name.as_str()), share));
    owners.chain(limits.purposes.iter().map(|(name, share)| (Party::Purpose(name), share)))
}

impl Ledger {
    /// Sets all limits of a device anew. What is held above them stays.
    pub fn set_limits(&mut self, device: &DeviceId, limits: SetLimits) {
        if let Some(book) = self.books.get_mut(device) {
            book.limits = Arc::new(limits);
        }
    }

    pub fn limit(&self, device: &DeviceId) -> Option<u64> {
        self.books.get(device).map(Book::limit)
    }

    /// The limits of a device as they were set, the most that may be held there, and how much more is.
    pub fn limits(&self, device: &DeviceId) -> Option<Limits> {
        let book = self.books.get(device)?;
        let limit_bytes = book.limit();
        Some(Limits { set: book.limits.clone(), limit_bytes, above_bytes: self.above(device, limit_bytes) })
    }

    /// How much more is held on a device than `bytes`, once what is on its way back is there.
    pub fn above(&self, device: &DeviceId, bytes: u64) -> u64 {
        self.books.get(device).map_or(0, |book| book.staying().saturating_sub(bytes))
    }

    /// How much more is held than is wanted, if that is said.
    pub fn above_soft(&self, device: &DeviceId) -> u64 {
        let soft = self.books.get(device).and_then(|book| book.limits.soft_limit_bytes);
        soft.map_or(0, |soft| self.above(device, soft.get()))
    }

    fn used_by(&self, book: &Book, party: Party<'_>) -> u64 {
        used_by(&self.allocations, &book.facts.device, party)
    }

    /// How `requests` stand on a device. `returning`: what is on its way back counts as there.
    pub(super) fn standing(&self, book: &Book, requests: &[&Request], returning: bool) -> Standing {
        let mut standing = Standing { above: 0, above_models: 0, kept: 0 };
        for (party, share) in parties(&book.limits) {
            let mut used = self.used_by(book, party);
            if returning {
                used = used.saturating_sub(self.leaving(book, party));
            }
            let own = requests.iter().filter(|request| party.has(request));
            let own = own.fold(0_u64, |sum, request| sum.saturating_add(request.size_bytes));
            if own == 0 {
                let reserve = share.reserve_bytes.map_or(0, Bytes::get);
                standing.kept = standing.kept.saturating_add(reserve.saturating_sub(used));
            } else if let Some(limit) = share.limit_bytes {
                let above = used.saturating_add(own).saturating_sub(limit.get());
                let models = matches!(party, Party::Owner("vramd"));
                let which = if models { &mut standing.above_models } else { &mut standing.above };
                *which = above.max(*which);
            }
        }
        standing
    }

    /// What others have in reserve, and the most that the limits of owners and purposes leave that all of `requests` are of.
    pub(super) fn left_by_limits(&self, book: &Book, requests: &[Request], returning: bool) -> (u64, u64) {
        let (mut kept, mut most) = (0_u64, u64::MAX);
        for (party, share) in parties(&book.limits) {
            let mut used = self.used_by(book, party);
            if returning {
                used = used.saturating_sub(self.leaving(book, party));
            }
            if !requests.iter().any(|request| party.has(request)) {
                let reserve = share.reserve_bytes.map_or(0, Bytes::get);
                kept = kept.saturating_add(reserve.saturating_sub(used));
            } else if let Some(limit) = share.limit_bytes
                && requests.iter().all(|request| party.has(request))
            {
                most = most.min(limit.get().saturating_sub(used));
            }
        }
        (kept, most)
    }

    /// What of a party's is on its way back.
    fn leaving(&self, book: &Book, party: Party<'_>) -> u64 {
        let goes = |it: &&Arc<Allocation>| {
            it.device == book.facts.device && party.has(&it.request) && book.goes(it.segment)
        };
        self.allocations.values().filter(goes).map(|it| it.block_bytes).sum()
    }

    /// Whether requests are above limits of their own, so that no room helps them.
    pub fn is_limited(&self, requests: &[Request], device: &DeviceId) -> bool {
        let Some(book) = self.books.get(device) else { return false };
        let standing = self.standing(book, &requests.iter().collect::<Vec<_>>(), false);
        standing.above > 0 || standing.above_models > 0
    }

    /// Whether the limits of their owners and purposes would ever let requests have as much together.
    pub(super) fn may_ever(book: &Book, requests: &[Request]) -> bool {
        parties(&book.limits).all(|(party, share)| {
            let own = requests.iter().filter(|request| party.has(request));
            let own = own.fold(0_u64, |sum, request| sum.saturating_add(request.size_bytes));
            share.limit_bytes.is_none_or(|limit| own <= limit.get())
        })
    }

    /// Of blocks that could go, given by what their absence costs, those that may: no more than their owners and purposes have above
    /// their reserves. `whose`: for that request, which takes from its own.
    pub fn above_reserves(
        &self,
        device: &DeviceId,
        blocks: &[(AllocationId, f64)],
        whose: &Request,
    ) -> Vec<bool> {
        let mut may = vec![true; blocks.len()];
        let Some(book) = self.books.get(device) else { return may };
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        order.sort_by(|a, b| blocks[*a].1.total_cmp(&blocks[*b].1));
        for (party, share) in parties(&book.limits).filter(|(party, _)| !party.has(whose)) {
            let Some(reserve) = share.reserve_bytes.map(Bytes::get) else { continue };
            let used = self.used_by(book, party).saturating_sub(self.leaving(book, party));
            let mut left = used.saturating_sub(reserve);
            for at in &order {
                let Some(held) = self.allocation(blocks[*at].0).filter(|held| party.has(&held.request))
                else {
                    continue;
                };
                may[*at] &= held.block_bytes <= left;
                left = left.saturating_sub(held.block_bytes);
            }
        }
        may
    }

    /// Which limit of an owner or a purpose is in a request's way, in words.
    pub(super) fn limited_by(&self, book: &Book, request: &Request) -> Option<String> {
        parties(&book.limits).filter(|(party, _)| party.has(request)).find_map(|(party, share)| {
            let (limit, used) = (share.limit_bytes?.get(), self.used_by(book, party));
            let whose = match party {
                Party::Owner(name) => format!("owner {name}"),
                Party::Purpose(name) => format!("purpose {name}"),
            };
            let (shown, has) = (Bytes::show(limit), Bytes::show(used));
            let device = &book.facts.device;
            (used.saturating_add(request.size_bytes) > limit)
                .then(|| format!("{whose} may have {shown} on {device}, and has {has}"))
        })
    }
}
