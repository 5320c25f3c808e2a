//! How single values are written: words, sizes, and what is named with another beside it.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use vramd_api::{
    AllocationId, AllocationType, Bytes, ClearTarget, ComponentName, EvictionPolicy, MemoryType, ModelName,
    OnShortage, OperationState, PlanItem, PlannedRun, PressureLevel, Priority, RestartPolicy,
};
use vramd_core::replay::Format;

#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// The configured one, or none.
    Default,
    Bytes(Bytes),
}

/// What an owner or a purpose may have.
#[derive(Debug, Clone)]
pub struct Share<K> {
    pub name: K,
    pub limit: Option<Bytes>,
    pub reserve: Option<Bytes>,
}

#[derive(Debug, Clone)]
pub enum Movable {
    Allocation(AllocationId),
    Model(Target),
}

#[derive(Debug, Clone)]
pub struct Target {
    pub model: ModelName,
    pub component: Option<ComponentName>,
}

/// What the memory of a run depends on.
#[derive(Debug, Clone)]
pub struct Shape(pub Vec<u64>);

pub type Words<T> = &'static [(&'static str, T)];

pub const ALLOCATION_TYPES: Words<AllocationType> = &[
    ("Buffer", AllocationType::Buffer),
    ("Weights", AllocationType::Weights),
    ("KvCache", AllocationType::KvCache),
    ("Activation", AllocationType::Activation),
    ("Workspace", AllocationType::Workspace),
    ("Staging", AllocationType::Staging),
];
pub const MEMORY_TYPES: Words<MemoryType> = &[
    ("RAM", MemoryType::Ram),
    ("VRAM", MemoryType::Vram),
    ("Shared", MemoryType::Shared),
    ("Unified", MemoryType::Unified),
];
pub const PRIORITIES: Words<Priority> = &[
    ("Low", Priority::Low),
    ("Normal", Priority::Normal),
    ("High", Priority::High),
    ("Critical", Priority::Critical),
];
pub const CLEAR_TARGETS: Words<ClearTarget> = &[
    ("Cache", ClearTarget::Cache),
    ("Unused", ClearTarget::Unused),
    ("Allocations", ClearTarget::Allocations),
    ("Zero", ClearTarget::Zero),
];
pub const ON_SHORTAGE: Words<OnShortage> = &[
    ("fail", OnShortage::Fail),
    ("wait", OnShortage::Wait),
    ("evict", OnShortage::Evict),
    ("spill", OnShortage::Spill),
];
pub const EVICTION_POLICIES: Words<EvictionPolicy> = &[
    ("LowestCost", EvictionPolicy::LowestCost),
    ("LeastRecentlyUsed", EvictionPolicy::LeastRecentlyUsed),
    ("LeastFrequentlyUsed", EvictionPolicy::LeastFrequentlyUsed),
    ("LargestFirst", EvictionPolicy::LargestFirst),
    ("LowestPriority", EvictionPolicy::LowestPriority),
];
pub const PRESSURE_LEVELS: Words<PressureLevel> = &[
    ("Normal", PressureLevel::Normal),
    ("Moderate", PressureLevel::Moderate),
    ("High", PressureLevel::High),
    ("Critical", PressureLevel::Critical),
];
pub const RESTART_POLICIES: Words<RestartPolicy> = &[
    ("Never", RestartPolicy::Never),
    ("OnFailure", RestartPolicy::OnFailure),
    ("Always", RestartPolicy::Always),
];
pub const TRACE_FORMATS: Words<Format> =
    &[("vramd", Format::Vramd), ("rmm", Format::Rmm), ("pytorch", Format::Pytorch)];
pub const OPERATION_STATES: Words<OperationState> = &[
    ("Queued", OperationState::Queued),
    ("Running", OperationState::Running),
    ("Completed", OperationState::Completed),
    ("Failed", OperationState::Failed),
    ("Cancelled", OperationState::Cancelled),
];

/// Takes one of the words that JSON has for a value.
pub fn words<T: Copy + Send + Sync + 'static>(words: Words<T>) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(words.iter().map(|(word, _)| *word)).map(move |typed| {
        let found = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(&typed));
        found.expect("the parser lets only these words pass").1
    })
}

pub fn parse_bytes(text: &str) -> Result<u64, String> {
    vramd_api::parse_size(text).map_err(|error| error.to_string())
}

pub fn parse_alignment(text: &str) -> Result<u64, String> {
    let most = 1 << 40;
    match parse_bytes(text) {
        Ok(bytes) if bytes.is_power_of_two() && bytes <= most => Ok(bytes),
        _ => Err(format!("{text:?} is no power of two up to {most}")),
    }
}

pub fn parse_shape(text: &str) -> Result<Shape, String> {
    let numbers = text.split(['x', ',']).map(|number| number.trim().parse().ok().filter(|it| *it > 0));
    numbers.collect::<Option<_>>().map(Shape).ok_or_else(|| "write numbers, such as 1x1024x1024".to_owned())
}

pub fn parse_plan_item(text: &str) -> Result<PlanItem, String> {
    let (text, run) = text.split_once('+').map_or((text, None), |(text, run)| (text, Some(run)));
    let (model, device) = text.split_once('@').map_or((text, None), |(model, device)| (model, Some(device)));
    let model = model.parse().map_err(|error: vramd_api::BadName| error.to_string())?;
    let planned = |text: &str| match parse_shape(text) {
        Ok(Shape(shape)) => Ok(PlannedRun { shape, size_bytes: None }),
        Err(_) => match text.parse() {
            Ok(size) => Ok(PlannedRun { shape: Vec::new(), size_bytes: Some(size) }),
            Err(_) => Err(format!("{text:?} is neither a shape such as 1x1024x1024 nor a size such as 2GiB")),
        },
    };
    let working_memory = run.map(planned).transpose()?;
    Ok(PlanItem { model, components: None, device_id: device.map(str::to_owned), working_memory })
}

pub fn parse_limit(text: &str) -> Result<Limit, String> {
    if text == "default" {
        return Ok(Limit::Default);
    }
    text.parse().map(Limit::Bytes).map_err(|error: vramd_api::BadSize| error.to_string())
}

pub fn parse_share<K: std::str::FromStr>(text: &str) -> Result<Share<K>, String>
where
    K::Err: std::fmt::Display,
{
    let (name, sizes) = text.rsplit_once('=').ok_or("write NAME=LIMIT, NAME=LIMIT,RESERVE or NAME=")?;
    let (limit, reserve) = sizes.split_once(',').unwrap_or((sizes, ""));
    let size = |text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|error: vramd_api::BadSize| error.to_string()),
    };
    let name = name.parse().map_err(|error: K::Err| error.to_string())?;
    Ok(Share { name, limit: size(limit)?, reserve: size(reserve)? })
}

pub fn parse_component(text: &str) -> Result<(ComponentName, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    let name = name.parse().map_err(|error: vramd_api::BadName| error.to_string())?;
    if path.is_empty() { Err("the path is missing".to_owned()) } else { Ok((name, path.into())) }
}

pub fn parse_movable(text: &str) -> Result<Movable, vramd_api::BadName> {
    match text.parse() {
        Ok(id) => Ok(Movable::Allocation(id)),
        Err(_) => parse_target(text).map(Movable::Model),
    }
}

pub fn parse_target(text: &str) -> Result<Target, vramd_api::BadName> {
    let (model, component) = match text.split_once('/') {
        Some((model, component)) => (model, Some(component.parse()?)),
        None => (text, None),
    };
    Ok(Target { model: model.parse()?, component })
}

/// `NAME=VALUE`.
pub fn parse_variable(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) =
        text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
