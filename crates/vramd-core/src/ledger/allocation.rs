//! Allocations and what keeps them.
//!
//! `Reserved → Active → Releasing → gone`; a reservation whose segment cannot be had is gone at once.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use vramd_api::attach::Access;
use vramd_api::{
    AllocationHistoryEntry, AllocationId, AllocationStatus, AllocationType, Basis, DeviceId, Holder, LeaseId,
    LeaseKind, MemoryType, ModelName, OwnerName, Priority, Reservation,
};

use super::SegmentId;
use crate::{Now, Tick};

/// The most processes that one allocation remembers.
const SEEN_BY: usize = 32;
/// The most history entries that one allocation keeps; the oldest go first.
const HISTORY: usize = 32;

/// A request as the ledger takes it: checked, with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub id: AllocationId,
    pub size_bytes: u64,
    /// A power of two.
    pub alignment: u64,
    pub allocation_type: AllocationType,
    pub memory_type: Option<MemoryType>,
    pub purpose: String,
    pub priority: Priority,
    pub owner: OwnerName,
    pub persistent: bool,
    pub generation: u64,
    /// In a segment that no importer can ever write to: models.
    pub sealed: bool,
    /// It is only room: its bytes are made by a process of its owner's.
    pub room: Option<Box<Room>>,
}

/// What room is for that an owner's process fills, and what is used of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Room {
    pub model: Option<ModelName>,
    pub shape: Vec<u64>,
    pub basis: Basis,
    pub estimate_bytes: Option<u64>,
    pub learned_bytes: Option<u64>,
    pub pid: Option<u32>,
    /// What the process held of it already when it was reserved.
    pub held_bytes: u64,
    /// What the process used on the device without it, if it is followed.
    pub base_bytes: Option<u64>,
    pub used_bytes: u64,
    pub peak_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    pub request: Request,
    pub device: DeviceId,
    pub segment: SegmentId,
    pub offset: u64,
    /// What is charged: the size rounded up to what the segment gives out.
    pub block_bytes: u64,
    pub state: State,
    pub leases: BTreeMap<LeaseId, Lease>,
    pub created_at: Timestamp,
    pub history: VecDeque<AllocationHistoryEntry>,
    /// How often somebody began to write to it. A move that sees it change has copied old bytes.
    pub writes: u64,
    /// The processes that have had it attached, the last ones: who may have its memory mapped still.
    pub seen_by: VecDeque<Holder>,
    /// The allocation whose other place this holds: the new one until it has moved, the old one afterwards.
    pub place_of: Option<AllocationId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Admitted; its segment is still being made.
    Reserved,
    Active,
    /// Its bytes are being zeroed or given back.
    Releasing,
}

/// What keeps an allocation. When the last one ends, it is released.
#[derive(Debug, Clone, PartialEq)]
pub enum Lease {
    /// A process is attached.
    Connection {
        holder: Holder,
        access: Access,
        moves: bool,
    },
    TimeToLive {
        seconds: u64,
        deadline: Tick,
        expires_at: Timestamp,
    },
    Persistent,
    Model,
    /// An operation reads or writes its bytes.
    Operation {
        task: Task,
    },
}

/// What an operation does with an allocation's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// It gets another place.
    Move,
    /// It is, or becomes, the other place of one that moves.
    Place,
    /// It is copied from.
    Read,
    /// It is copied to, or zeroed.
    Write,
}

impl Lease {
    pub fn time_to_live(seconds: u64, now: Now) -> Self {
        Self::TimeToLive {
            seconds,
            deadline: now.tick.after_seconds(seconds),
            expires_at: now.wall_after(seconds),
        }
    }

    pub fn deadline(&self) -> Option<Tick> {
        match self {
            Self::TimeToLive { deadline, .. } => Some(*deadline),
            Self::Connection { .. } | Self::Persistent | Self::Model | Self::Operation { .. } => None,
        }
    }

    /// The process that is attached.
    pub fn holder(&self) -> Option<&Holder> {
        match self {
            Self::Connection { holder, .. } => Some(holder),
            Self::TimeToLive { .. } | Self::Persistent | Self::Model | Self::Operation { .. } => None,
        }
    }

    /// Whether who has it may write.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Connection { access: Access::Write, .. } | Self::Operation { task: Task::Write })
    }

    fn to_api(&self, id: LeaseId) -> vramd_api::Lease {
        let (kind, expires_at, holder) = match self {
            Self::Connection { holder, .. } => (LeaseKind::Connection, None, Some(holder.clone())),
            Self::TimeToLive { expires_at, .. } => (LeaseKind::TimeToLive, Some(*expires_at), None),
            Self::Persistent => (LeaseKind::Persistent, None, None),
            Self::Model => (LeaseKind::Model, None, None),
            Self::Operation { .. } => (LeaseKind::Operation, None, None),
        };
        vramd_api::Lease { lease_id: id, kind, expires_at, holder }
    }
}

impl Room {
    fn to_api(&self) -> Reservation {
        Reservation {
            model: self.model.clone(),
            shape: self.shape.clone(),
            basis: self.basis,
            estimate_bytes: self.estimate_bytes,
            learned_bytes: self.learned_bytes,
            pid: self.pid,
            used_bytes: self.used_bytes,
            peak_bytes: self.peak_bytes,
        }
    }
}

impl Allocation {
    /// The processes that are attached.
    pub fn holders(&self) -> impl Iterator<Item = &Holder> {
        self.leases.values().filter_map(Lease::holder)
    }

    /// What operations do with it.
    pub fn tasks(&self) -> impl Iterator<Item = Task> {
        self.leases.values().filter_map(|lease| match lease {
            Lease::Operation { task } => Some(*task),
            Lease::Connection { .. } | Lease::TimeToLive { .. } | Lease::Persistent | Lease::Model => None,
        })
    }

    /// Somebody keeps it who is no operation.
    pub fn is_kept(&self) -> bool {
        self.leases.values().any(|lease| !matches!(lease, Lease::Operation { .. }))
    }

    /// The lease of each model that has it as a component.
    pub fn model_leases(&self) -> impl Iterator<Item = LeaseId> {
        self.leases.iter().filter(|(_, lease)| matches!(lease, Lease::Model)).map(|(id, _)| *id)
    }

    pub fn model_count(&self) -> usize {
        self.model_leases().count()
    }

    /// It is there, somebody keeps it who is no operation, and it is nobody's other place.
    pub fn is_open(&self) -> bool {
        self.state == State::Active && self.place_of.is_none() && self.is_kept()
    }

    /// Somebody may write to it now.
    pub fn is_written(&self) -> bool {
        self.leases.values().any(Lease::writes)
    }

    pub fn is_attached(&self) -> bool {
        self.holders().next().is_some()
    }

    /// Remembers a process that has its memory now.
    pub(super) fn seen(&mut self, holder: &Holder) {
        if self.seen_by.contains(holder) {
            return;
        }
        if self.seen_by.len() == SEEN_BY {
            self.seen_by.pop_front();
        }
        self.seen_by.push_back(holder.clone());
    }

    pub fn note(&mut self, now: Now, what: impl Into<String>) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(AllocationHistoryEntry { at: now.wall, what: what.into() });
    }

    /// As the interfaces show it; a reservation is not an allocation yet.
    pub fn to_api(&self) -> Option<vramd_api::Allocation> {
        let status = match self.state {
            State::Reserved => return None,
            State::Active if self.place_of.is_some() || self.tasks().any(|task| task == Task::Move) => {
                AllocationStatus::Moving
            }
            State::Active => AllocationStatus::Active,
            State::Releasing => AllocationStatus::Releasing,
        };
        let request = &self.request;
        Some(vramd_api::Allocation {
            allocation_id: request.id,
            device_id: self.device.clone(),
            size_bytes: request.size_bytes,
            block_bytes: self.block_bytes,
            alignment: request.alignment,
            allocation_type: request.allocation_type,
            purpose: request.purpose.clone(),
            priority: request.priority,
            persistent: request.persistent,
            status,
            owner: request.owner.clone(),
            generation: request.generation,
            leases: self.leases.iter().map(|(id, lease)| lease.to_api(*id)).collect(),
            created_at: self.created_at,
            place_of: self.place_of,
            reservation: request.room.as_deref().map(Room::to_api),
            placement: None,
            history: None,
        })
    }
}
