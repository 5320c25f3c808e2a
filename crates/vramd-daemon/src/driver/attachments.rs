//! Attachments: a connection, and the allocation that it keeps.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::value::RawValue;
use tokio::sync::mpsc;
use uuid::Uuid;
use vramd_api::attach::{Access, HandleType};
use vramd_api::{
    AllocationId, ApiError, ComponentName, DeviceId, ErrorCode, EventKind, LeaseId, ModelName, ResidencyState,
};
use vramd_core::ledger::{Allocation, Lease};
use vramd_core::models::{Plan, Residency};
use vramd_device::{Facts, SegmentId};

use super::models::{no_component, no_model, not_resident};
use super::refusals::being_released;
use super::{AttachRequest, AttachTarget, Caller, Reply, State};

/// What a connection got: a lease, and where the bytes are.
#[derive(Debug)]
pub struct Attachment {
    pub lease: LeaseId,
    pub allocation: AllocationId,
    pub device: DeviceId,
    pub segment: SegmentId,
    pub segment_bytes: u64,
    pub block_offset: u64,
    pub block_bytes: u64,
    pub generation: u64,
    pub model: Option<(ModelName, ComponentName)>,
    pub plan: Option<Arc<Plan>>,
}

impl Attachment {
    /// The tensor table; an allocation has none.
    pub fn table(&self) -> Arc<RawValue> {
        match &self.plan {
            Some(plan) => plan.table.clone(),
            None => RawValue::from_string("[]".to_owned()).expect("an empty array is JSON").into(),
        }
    }

    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.plan.as_ref().map(|plan| plan.layout.metadata.clone()).unwrap_or_default()
    }
}

/// What a connection is told.
#[derive(Debug)]
pub enum Told {
    Moved(Moved),
    /// Its lease was ended by force.
    Close,
}

/// Where a reader's bytes are now.
#[derive(Debug)]
pub struct Moved {
    pub device: DeviceId,
    pub segment: SegmentId,
    pub segment_bytes: u64,
    pub block_offset: u64,
    pub block_bytes: u64,
    pub generation: u64,
}

/// An open attachment.
#[derive(Debug)]
pub(super) struct Reader {
    pub allocation: AllocationId,
    /// The model that it is used through.
    pub model: Option<ModelName>,
    tell: mpsc::UnboundedSender<Told>,
    /// The answer that it owes.
    pub pending: Option<Pending>,
}

/// A move that a reader has not followed.
#[derive(Debug)]
pub(super) struct Pending {
    pub generation: u64,
    /// Its lease on the old place.
    pub old: LeaseId,
    /// It said that it cannot follow.
    pub refused: bool,
}

/// Refuses what a client cannot import.
fn exported(facts: &Facts, taken: &[HandleType]) -> Result<(), ApiError> {
    let refused = |what: String| ApiError::new(ErrorCode::Conflict, what);
    let device = &facts.device;
    match facts.capabilities.handle {
        Some(handle) if taken.contains(&handle) => Ok(()),
        Some(handle) => Err(refused(format!("this client cannot import memory on {device}"))
            .hint("load or move it to cpu:0, or attach with a client that imports this handle")
            .detail("handle", serde_json::json!(handle))),
        None => Err(refused(format!("memory on {device} cannot be handed to other processes")).hint(
            "load or move it to a device that can export, such as cpu:0: `vramd devices` shows which can",
        )),
    }
}

/// Where the bytes to attach are.
struct Found {
    allocation: AllocationId,
    model: Option<(ModelName, ComponentName)>,
    plan: Option<Arc<Plan>>,
}

impl State {
    pub(super) fn attach(&mut self, request: AttachRequest, reply: Reply<Attachment>) {
        // A connection that closed while its request waited must not get a lease that nobody would end.
        if reply.is_closed() {
            return;
        }
        let answer = self.find(&request).and_then(|found| self.open(found, request));
        self.answer(reply, answer);
    }

    fn find(&self, request: &AttachRequest) -> Result<Found, ApiError> {
        match &request.target {
            AttachTarget::Model { model, component } => {
                if request.access == Access::Write {
                    return Err(ApiError::invalid("access", "a model's weights are attached read-only")
                        .hint(
                            "a private, copy-on-write mapping of a read-only descriptor can be written to",
                        ));
                }
                self.find_component(model, component.as_ref(), request.device.as_ref())
            }
            AttachTarget::Allocation(id) => {
                let allocation = self.open_to(*id, Caller { uid: Some(request.holder.uid) })?;
                if request.device.as_ref().is_some_and(|device| *device != allocation.device) {
                    return Err(ApiError::new(
                        ErrorCode::NotResident,
                        format!("allocation {id} is on {}", allocation.device),
                    ));
                }
                if allocation.request.sealed {
                    let purpose = &allocation.request.purpose;
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!("allocation {id} belongs to {purpose}"),
                    )
                    .hint(format!("attach the model: {purpose}")));
                }
                if self.removing.contains(id) {
                    return Err(being_released(*id));
                }
                Ok(Found { allocation: *id, model: None, plan: None })
            }
        }
    }

    fn find_component(
        &self,
        name: &ModelName,
        component: Option<&ComponentName>,
        device: Option<&DeviceId>,
    ) -> Result<Found, ApiError> {
        let model = self.models.get(name).ok_or_else(|| no_model(name))?;
        let component = match component {
            Some(component) => component,
            None => match model.components.keys().collect::<Vec<_>>().as_slice() {
                [only] => *only,
                many => {
                    let known: Vec<_> = many.iter().map(|component| format!("{name}/{component}")).collect();
                    return Err(ApiError::invalid(
                        "component",
                        format!("model {name} has several components"),
                    )
                    .hint(format!("name one of them: {}", known.join(", "))));
                }
            },
        };
        let entry = model.components.get(component).ok_or_else(|| no_component(model, component))?;
        let resident: Vec<_> = entry
            .residency
            .iter()
            // What only waits in RAM is nothing to compute with, unless somebody says so.
            .filter(|(on, residency)| match device {
                Some(device) => device == *on,
                None => residency.cached_from().is_none(),
            })
            .filter_map(|(on, residency)| match residency {
                Residency::Resident { allocation, plan, .. } => Some((on, *allocation, plan.clone())),
                Residency::Loading { .. } | Residency::Evicting { .. } => None,
            })
            .collect();
        match resident.as_slice() {
            [(_, allocation, plan)] => Ok(Found {
                allocation: *allocation,
                model: Some((name.clone(), component.clone())),
                plan: Some(plan.clone()),
            }),
            [] => {
                let place = device.map_or_else(|| "any device".to_owned(), ToString::to_string);
                let error = not_resident(name, &place);
                let loading =
                    entry.residency.values().any(|residency| matches!(residency, Residency::Loading { .. }));
                let state = if loading { ResidencyState::Loading } else { ResidencyState::OnDisk };
                let error = error.detail("state", serde_json::json!(state));
                let cached = entry.residency.iter().find(|(_, residency)| residency.cached_from().is_some());
                if let (Some((ram, _)), None) = (cached, device) {
                    let hint = format!("it had to go and waits in {ram}: `vramd load {name}` brings it back");
                    return Err(error.hint(hint));
                }
                Err(if loading { error.hint("it is being loaded: wait for that operation") } else { error })
            }
            many => {
                let places: Vec<_> = many.iter().map(|(on, ..)| on.as_str()).collect();
                Err(ApiError::invalid(
                    "deviceId",
                    format!("{name}/{component} is resident on {}", places.join(", ")),
                )
                .hint("name one of these devices"))
            }
        }
    }

    fn open(&mut self, found: Found, request: AttachRequest) -> Result<Attachment, ApiError> {
        let gone = || ApiError::not_found("allocation", found.allocation);
        let allocation: &Allocation = self.ledger.allocation(found.allocation).ok_or_else(gone)?;
        let device = self.devices.get(&allocation.device).ok_or_else(gone)?;
        if self.ledger.is_lost(&allocation.device) {
            return Err(ApiError::new(ErrorCode::DeviceLost, format!("{} is lost", allocation.device))
                .hint("load or allocate on another device"));
        }
        exported(device.facts(), &request.handles)?;
        if request.access == Access::Write {
            self.all_follow(found.allocation)?;
        }
        let lease = LeaseId(Uuid::now_v7());
        let attachment = Attachment {
            lease,
            allocation: found.allocation,
            device: allocation.device.clone(),
            segment: SegmentId(allocation.segment.0),
            segment_bytes: self.ledger.segment_bytes(found.allocation).unwrap_or(allocation.block_bytes),
            block_offset: allocation.offset,
            block_bytes: if found.plan.is_some() {
                allocation.block_bytes
            } else {
                allocation.request.size_bytes
            },
            generation: allocation.request.generation,
            model: found.model,
            plan: found.plan,
        };
        let AttachRequest { holder, access, moves, tell, .. } = request;
        self.emit(
            EventKind::AttachmentOpened,
            serde_json::json!({
                "leaseId": lease, "allocationId": found.allocation, "deviceId": attachment.device, "holder": holder,
                "model": attachment.model.as_ref().map(|(model, _)| model),
                "component": attachment.model.as_ref().map(|(_, component)| component),
            }),
        );
        let kept = Lease::Connection { holder, access, moves };
        self.ledger.grant(found.allocation, lease, kept, self.now);
        let name = attachment.model.as_ref().map(|(name, _)| name.clone());
        if let Some((name, component)) = &attachment.model {
            self.attached_model(name, component, &attachment.device);
        }
        let reader = Reader { allocation: found.allocation, model: name, tell, pending: None };
        self.attachments.insert(lease, reader);
        Ok(attachment)
    }

    /// A component is used. Whoever had it loaded just now counts once.
    fn attached_model(&mut self, name: &ModelName, component: &ComponentName, device: &DeviceId) {
        let now = self.now;
        let Some(model) = self.models.get_mut(name) else { return };
        model.last_used = Some(now);
        let entry = model.components.get_mut(component);
        if let Some(Residency::Resident { awaited, .. }) = entry.and_then(|it| it.residency.get_mut(device))
            && awaited.take().is_some_and(|until| until >= now.tick)
        {
            return;
        }
        model.used(now);
        self.note_use(name);
        self.try_policies(name, device);
    }

    /// Refuses to change bytes of which a reader still has the place of before, and would not see the change.
    pub(super) fn all_follow(&self, id: AllocationId) -> Result<(), ApiError> {
        let behind =
            |lease: &LeaseId| self.attachments.get(lease).is_some_and(|reader| reader.pending.is_some());
        let leases = self.ledger.allocation(id).into_iter().flat_map(|allocation| &allocation.leases);
        let holders: Vec<_> = leases
            .filter(|(lease, _)| behind(lease))
            .filter_map(|(_, kept)| kept.holder().cloned())
            .collect();
        let Some(first) = holders.first() else { return Ok(()) };
        let what = format!(
            "{} ({}) still reads allocation {id} where it was before it moved",
            first.command, first.pid
        );
        Err(ApiError::new(ErrorCode::Conflict, what)
            .hint("it would not see what is written now: try again in a moment, or once it has closed it")
            .detail("holders", serde_json::json!(holders)))
    }

    /// A lease has ended; if it was an attachment's, its model was used until now.
    pub(super) fn detached(&mut self, allocation: AllocationId, lease: LeaseId) {
        if let Some(Reader { model: name, pending, .. }) = self.attachments.remove(&lease) {
            if let Some(pending) = pending {
                self.finish_lease(pending.old);
            }
            let now = self.now;
            if let Some(model) = name.as_ref().and_then(|name| self.models.get_mut(name)) {
                model.last_used = Some(now);
            }
            let data = serde_json::json!({ "leaseId": lease, "allocationId": allocation, "model": name });
            self.emit(EventKind::AttachmentClosed, data);
        }
    }

    /// Tells a reader where its bytes are now; `pending` keeps the old ones until it answers.
    pub(super) fn tell_reader(&mut self, lease: LeaseId, allocation: &Allocation, pending: Pending) {
        let segment_bytes =
            self.ledger.segment_bytes(allocation.request.id).unwrap_or(allocation.block_bytes);
        let Some(reader) = self.attachments.get_mut(&lease) else { return };
        let moved = Moved {
            device: allocation.device.clone(),
            segment: SegmentId(allocation.segment.0),
            segment_bytes,
            block_offset: allocation.offset,
            block_bytes: if reader.model.is_some() {
                allocation.block_bytes
            } else {
                allocation.request.size_bytes
            },
            generation: pending.generation,
        };
        reader.pending = Some(pending);
        let tell = reader.tell.clone();
        self.outbox.push(Box::new(move || {
            // The connection may be gone: then its lease ends, and with it what it kept.
            let _ = tell.send(Told::Moved(moved));
        }));
    }

    /// Ends the leases of all that have an allocation attached. Their mappings stay theirs.
    pub(super) fn detach_all(&mut self, id: AllocationId) {
        let leases: Vec<_> = self
            .attachments
            .iter()
            .filter(|(_, reader)| reader.allocation == id)
            .map(|(lease, _)| *lease)
            .collect();
        for lease in leases {
            if let Some(reader) = self.attachments.get(&lease) {
                let _ = reader.tell.send(Told::Close);
            }
            self.lease_ended(lease);
        }
    }

    pub(super) fn move_answered(&mut self, lease: LeaseId, generation: u64, refused: Option<String>) {
        let Some(reader) = self.attachments.get_mut(&lease) else { return };
        let Some(pending) = reader.pending.as_mut().filter(|pending| pending.generation == generation) else {
            return;
        };
        if let Some(reason) = refused {
            // Once: what a peer says must not fill the log.
            if !std::mem::replace(&mut pending.refused, true) {
                let reason: String = reason.chars().take(200).collect();
                tracing::info!(%lease, allocation = %reader.allocation, ?reason, "a reader cannot follow a move");
            }
            return;
        }
        let old = pending.old;
        reader.pending = None;
        self.finish_lease(old);
    }
}
