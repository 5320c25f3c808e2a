//! Models, their components and where these are resident.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::de::IntoDeserializer as _;
use serde::{Deserialize, Serialize};
use utoipa::{PartialSchema, ToSchema, openapi};

use crate::{
    AllocationId, ApiError, Checksum, ComponentName, DeviceId, ModelName, OnShortage, OperationId, Priority,
};

/// How long an idle model stays resident: a duration (`"5m"`, `"1h30m"`, `300` seconds), 0 for not at all,
/// or −1 for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeepAlive {
    Seconds(u64),
    Forever,
}

impl KeepAlive {
    /// The default, as in Ollama.
    pub const DEFAULT: Self = Self::Seconds(300);
    /// A hundred years: longer is `Forever`, said plainly.
    const MAX_SECONDS: u64 = 3_155_760_000;
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Seconds(total) = *self else { return f.pad("-1") };
        if total == 0 {
            return f.pad("0s");
        }
        for (count, unit) in [(total / 3600, 'h'), (total / 60 % 60, 'm'), (total % 60, 's')] {
            if count > 0 {
                write!(f, "{count}{unit}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for KeepAlive {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const RULE: &str = "write a duration such as 90s, 5m or 1h30m, 0, or -1 for ever";
        let text = text.trim();
        if text.starts_with('-') {
            let rest = text.trim_start_matches('-').trim_end_matches(['s', 'm', 'h']);
            return if rest.parse::<u64>().is_ok_and(|n| n > 0) { Ok(Self::Forever) } else { Err(RULE) };
        }
        let mut total = 0u64;
        let mut digits = String::new();
        let mut any = false;
        for c in text.chars() {
            if c.is_ascii_digit() {
                digits.push(c);
                continue;
            }
            let scale = match c {
                's' => 1,
                'm' => 60,
                'h' => 3600,
                'd' => 86400,
                _ => return Err(RULE),
            };
            let count: u64 = digits.parse().map_err(|_| RULE)?;
            total = count.checked_mul(scale).and_then(|part| total.checked_add(part)).ok_or(RULE)?;
            digits.clear();
            any = true;
        }
        if !digits.is_empty() {
            if any {
                return Err(RULE);
            }
            total = digits.parse().map_err(|_| RULE)?;
        } else if !any {
            return Err(RULE);
        }
        if total > Self::MAX_SECONDS { Err(RULE) } else { Ok(Self::Seconds(total)) }
    }
}

impl Serialize for KeepAlive {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeepAlive {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = KeepAlive;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a duration such as \"90s\", \"5m\" or \"1h30m\", a number of seconds, or -1 for ever",
                )
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<KeepAlive, E> {
                text.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
            fn visit_u64<E: serde::de::Error>(self, seconds: u64) -> Result<KeepAlive, E> {
                if seconds > KeepAlive::MAX_SECONDS {
                    return Err(E::invalid_value(serde::de::Unexpected::Unsigned(seconds), &self));
                }
                Ok(KeepAlive::Seconds(seconds))
            }
            fn visit_i64<E: serde::de::Error>(self, seconds: i64) -> Result<KeepAlive, E> {
                match u64::try_from(seconds) {
                    Ok(seconds) => self.visit_u64(seconds),
                    Err(_) => Ok(KeepAlive::Forever),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl PartialSchema for KeepAlive {
    fn schema() -> openapi::RefOr<openapi::Schema> {
        let text = openapi::ObjectBuilder::new().schema_type(openapi::schema::Type::String).pattern(Some(
            "^([0-9]{1,6}|([0-9]{1,6}h)?([0-9]{1,4}m)?[0-9]{1,4}s|([0-9]{1,6}h)?[0-9]{1,4}m|[0-9]{1,6}h|-1)$",
        ));
        let number = openapi::ObjectBuilder::new()
            .schema_type(openapi::schema::Type::Integer)
            .maximum(Some(Self::MAX_SECONDS));
        openapi::OneOfBuilder::new()
            .item(text)
            .item(number)
            .description(Some(
                "How long an idle model stays resident: \"5m\", \"1h30m\", seconds, 0, or −1 (any negative number) for ever.",
            ))
            .into()
    }
}

impl ToSchema for KeepAlive {}

/// `POST /api/models`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RegisterModel {
    pub name: ModelName,
    /// One or more; a model of one part calls it `weights`.
    #[serde(deserialize_with = "crate::object::map")]
    #[schema(schema_with = components_schema)]
    pub components: BTreeMap<ComponentName, ComponentSource>,
    /// What `load` uses when it names none. Default `5m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
    #[serde(default)]
    pub pinned: bool,
    /// How much its absence costs beside that of others, and whose loads go first.
    #[serde(default)]
    pub priority: Priority,
}

/// The macro has no word for "at least one entry".
fn components_schema() -> openapi::schema::Object {
    openapi::ObjectBuilder::new()
        .schema_type(openapi::schema::Type::Object)
        .property_names(Some(ComponentName::schema()))
        .additional_properties(Some(openapi::Ref::from_schema_name("ComponentSource")))
        .min_properties(Some(1))
        .description(Some("One or more; a model of one part calls it `weights`."))
        .build()
}

/// Where a component's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ComponentSource {
    /// Absolute, inside a model root: a `.safetensors` file, a `.safetensors.index.json`, a `.gguf` file (of several the first),
    /// or a directory that holds exactly one of these.
    #[schema(min_length = 1, max_length = 4096)]
    pub path: String,
}

/// `POST /api/models/{name}/load`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadRequest {
    /// A device's id or uuid. Default: where its other components are, else the best device for all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// Default: all components.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1)]
    pub components: Option<Vec<ComponentName>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
    /// What to do when there is no room. Default `evict`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_shortage: Option<OnShortage>,
    /// How long to wait for room when `onShortage` is `wait` (default 30), or `evict` and no idle model is in the way (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 86400)]
    pub timeout_seconds: Option<u64>,
    /// Its components may go to different devices, if none has room for all of them. Not together with `deviceId`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub split: bool,
    /// Sum the bytes that have arrived; every later load of the same files is held to that, until the daemon ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checksum: bool,
}

impl fmt::Display for EvictionPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl FromStr for EvictionPolicy {
    type Err = serde::de::value::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::deserialize(text.into_deserializer())
    }
}

/// By what those are chosen that go when room is needed. Models of lower priority always count less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
pub enum EvictionPolicy {
    /// What costs least: seconds to load it again, as often as it was used lately.
    #[default]
    LowestCost,
    LeastRecentlyUsed,
    LeastFrequentlyUsed,
    LargestFirst,
    /// Those of the lowest priority, and of these the least recently used.
    LowestPriority,
}

/// `POST /api/models/{name}/prefetch`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PrefetchRequest {
    /// Where it will be used: a device's id or uuid. Default: the first card that could hold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// `POST /api/models/{name}/unload`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UnloadRequest {
    /// A device's id or uuid. Default: every device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// `POST /api/models/{name}/touch`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TouchRequest {
    /// Replaces the model's keep-alive, if given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    pub name: ModelName,
    /// The payload of all components.
    pub size_bytes: u64,
    pub components: Vec<Component>,
    pub pinned: bool,
    pub priority: Priority,
    pub keep_alive: KeepAlive,
    /// When it is unloaded unless it is used; absent while it is not resident, pinned, attached or kept for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    pub registered_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Component {
    pub name: ComponentName,
    pub path: String,
    pub size_bytes: u64,
    pub tensor_count: u64,
    pub shard_count: u64,
    /// One entry for each device where it is more than on disk; without any, it is `OnDisk` only.
    pub residency: Vec<Residency>,
    /// Of its bytes as its files have them, if a load since the daemon's start was asked for one; every later load is held to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<Checksum>,
    /// Why the file could not be read when it was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Residency {
    pub device_id: DeviceId,
    pub state: ResidencyState,
    /// What it occupies there.
    pub bytes: u64,
    /// Connections that have it attached.
    pub attached_count: u64,
    /// Components of the same files have the one block: it counts once, and goes with the last of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// It had to go from that device and is kept in RAM for its next use there; a load brings it back from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_from: Option<DeviceId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_id: Option<AllocationId>,
    /// The load or unload under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum ResidencyState {
    OnDisk,
    Loading,
    Resident,
    Evicting,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelPage {
    pub models: Vec<Model>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_alive_reads_what_ollama_reads() {
        for (json, expected) in [
            ("\"5m\"", KeepAlive::Seconds(300)),
            ("\"1h30m\"", KeepAlive::Seconds(5400)),
            ("\"300\"", KeepAlive::Seconds(300)),
            ("300", KeepAlive::Seconds(300)),
            ("0", KeepAlive::Seconds(0)),
            ("-1", KeepAlive::Forever),
            ("\"-1\"", KeepAlive::Forever),
            ("\"-1m\"", KeepAlive::Forever),
        ] {
            assert_eq!(serde_json::from_str::<KeepAlive>(json).ok(), Some(expected), "{json}");
        }
        for json in
            ["\"\"", "\"5\\u0661m\"", "\"m\"", "\"5x\"", "\"5m3\"", "1.5", "null", "\"--\"", "99999999999"]
        {
            assert!(serde_json::from_str::<KeepAlive>(json).is_err(), "{json} was taken");
        }
    }

    #[test]
    fn keep_alive_is_written_so_that_it_reads_back() {
        for seconds in [0, 1, 59, 60, 300, 3600, 5400, 90061] {
            let keep_alive = KeepAlive::Seconds(seconds);
            assert_eq!(keep_alive.to_string().parse(), Ok(keep_alive));
        }
        assert_eq!(KeepAlive::Forever.to_string().parse(), Ok(KeepAlive::Forever));
    }
}
