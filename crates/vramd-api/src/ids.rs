//! Identifiers as types: a device cannot be passed where a model is meant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A text that is not a valid name or id, with the rule that it breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid {what}: {rule}")]
pub struct BadName {
    /// What the text was meant to be.
    pub what: &'static str,
    /// The text, cut to 80 characters.
    pub text: String,
    /// The rule in words.
    pub rule: &'static str,
}

impl BadName {
    fn new(what: &'static str, text: &str, rule: &'static str) -> Self {
        Self { what, text: text.chars().take(80).collect(), rule }
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = Uuid)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, BadName> {
                Uuid::try_parse(text)
                    .map(Self)
                    .map_err(|_| BadName::new($what, text, "a UUID such as 0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f"))
            }
        }
    };
}

uuid_id!(
    /// Names one allocation, on this machine and beyond it.
    AllocationId, "allocation id");
uuid_id!(
    /// Names one operation; a transfer's id is its operation's id.
    OperationId, "operation id");
uuid_id!(
    /// Names one lease.
    LeaseId, "lease id");
uuid_id!(
    /// Names one worker, over all its restarts.
    WorkerId, "worker id");

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $pattern:literal, $example:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, pattern = $pattern, example = $example)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, BadName> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.into())) } else { Err(BadName::new($what, text, $rule)) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

text_id!(
    /// Names a device: `cpu:0`, `cuda:0`, `vulkan:0`, `d3d12:0`, `sim:0`.
    DeviceId, "device id", "a kind and an ordinal, such as cpu:0",
    "^[a-z][a-z0-9]{0,15}:[0-9]{1,5}$", "cpu:0", is_device_id);
text_id!(
    /// Names a registered model.
    ModelName, "model name",
    "1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or a digit",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", "minilm", is_plain_name);
text_id!(
    /// Names a component of a model: `unet`, `vae`, `encoder`, `weights`.
    ComponentName, "component name",
    "1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or a digit",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", "weights", is_plain_name);
text_id!(
    /// What a worker is called, or a program that workers run.
    WorkerName, "worker name",
    "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", "embedder", is_worker_name);
text_id!(
    /// Says for whom memory is held. A label, not a credential.
    OwnerName, "owner", "1 to 128 printable ASCII characters without spaces",
    "^[!-~]{1,128}$", "trainer", is_owner);

fn is_device_id(text: &str) -> bool {
    let Some((kind, ordinal)) = text.split_once(':') else { return false };
    (1..=16).contains(&kind.len())
        && kind.starts_with(|c: char| c.is_ascii_lowercase())
        && kind.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        && (1..=5).contains(&ordinal.len())
        && ordinal.bytes().all(|b| b.is_ascii_digit())
}

fn is_plain_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// An owner is made of it.
fn is_worker_name(text: &str) -> bool {
    text.len() <= 64 && is_plain_name(text)
}

fn is_owner(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_where_they_are_parsed() {
        assert!("cpu:0".parse::<DeviceId>().is_ok());
        for bad in ["", "cpu", "cpu:", "CPU:0", ":0", "cpu:-1", "cpu:0 ", "cpu:123456"] {
            assert!(bad.parse::<DeviceId>().is_err(), "{bad:?} was taken");
        }
        assert!("sd_xl-1.0".parse::<ModelName>().is_ok());
        for bad in ["", ".hidden", "a/b", "a b", "../x", "ä"] {
            assert!(bad.parse::<ModelName>().is_err(), "{bad:?} was taken");
        }
        assert!(serde_json::from_str::<ModelName>("\"a/b\"").is_err());
    }
}
