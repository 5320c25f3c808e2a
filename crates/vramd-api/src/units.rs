//! Sizes: how they are written, read and bounded.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{PartialSchema, ToSchema, openapi};

/// A number of bytes, at least 1 and at most 2⁶³ − 1, as requests carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Bytes(u64);

impl Bytes {
    /// The largest size that any request may name: what a signed 64-bit integer holds.
    pub const MAX: u64 = i64::MAX as u64;

    pub fn new(bytes: u64) -> Option<Self> {
        (1..=Self::MAX).contains(&bytes).then_some(Self(bytes))
    }

    pub fn get(self) -> u64 {
        self.0
    }

    /// `bytes` in words, with binary units: `1.5 GiB`.
    pub fn show(bytes: u64) -> String {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if bytes < 1024 {
            return format!("{bytes} B");
        }
        let mut value = bytes as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1023.95 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        format!("{value:.1} {}", UNITS[unit])
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&Self::show(self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number of bytes from 1 to {}", Bytes::MAX)
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Bytes, E> {
                Bytes::new(value)
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Unsigned(value), &self))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Bytes, E> {
                u64::try_from(value)
                    .ok()
                    .and_then(Bytes::new)
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl PartialSchema for Bytes {
    fn schema() -> openapi::RefOr<openapi::Schema> {
        openapi::ObjectBuilder::new()
            .schema_type(openapi::schema::Type::Integer)
            .format(Some(openapi::SchemaFormat::KnownFormat(openapi::KnownFormat::Int64)))
            .minimum(Some(1))
            .maximum(Some(i64::MAX))
            .description(Some("A number of bytes, from 1 to 2⁶³ − 1."))
            .into()
    }
}

impl ToSchema for Bytes {}

/// A text that is no size, with what is wrong about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: {reason}")]
pub struct BadSize {
    pub text: String,
    pub reason: &'static str,
}

impl FromStr for Bytes {
    type Err = BadSize;
    fn from_str(text: &str) -> Result<Self, BadSize> {
        let bytes = parse_size(text)?;
        Self::new(bytes).ok_or(BadSize { text: text.to_owned(), reason: "it must be at least 1 byte" })
    }
}

/// Reads `512`, `8K`, `8KiB`, `1.5GiB` (powers of 1024) and `8KB`, `8GB` (powers of 1000), in any case.
///
/// A bare letter is binary, as it is in cgroups, QEMU and the JVM. What does not fit into 2⁶³ − 1 is refused.
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    let bad = |reason| BadSize { text: text.chars().take(80).collect(), reason };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let unit: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "p" | "pib" => 1 << 50,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "pb" => 1_000_000_000_000_000,
        _ => return Err(bad("units are B, K, M, G, T, P, KiB … PiB (1024) and KB … PB (1000)")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty()
        || fraction.contains('.')
        || fraction.len() > 9
        || (number.contains('.') && fraction.is_empty())
    {
        return Err(bad("write a number and a unit, such as 24GiB, 1.5G or 1048576"));
    }
    let whole: u64 = whole.parse().map_err(|_| bad("the number is too large"))?;
    let mut total = u128::from(whole) * u128::from(unit);
    if !fraction.is_empty() {
        let scale = 10u128.pow(fraction.len() as u32);
        let fraction: u128 = fraction.parse().map_err(|_| bad("the number is too large"))?;
        total += fraction * u128::from(unit) / scale;
    }
    u64::try_from(total)
        .ok()
        .filter(|bytes| *bytes <= Bytes::MAX)
        .ok_or_else(|| bad("it is larger than 2^63 - 1 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("8k", 8192),
            ("8KiB", 8192),
            ("8KB", 8000),
            ("1.5GiB", 3 << 29),
            ("24G", 24 << 30),
            ("2 MiB", 2 << 20),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "G",
            "-1",
            "1..5G",
            "1.G",
            "1.5.5G",
            "8X",
            "8Gi",
            "9223372036854775808",
            "99999999999P",
            "1e9",
            "0x10",
        ] {
            assert!(parse_size(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn sizes_in_requests_are_bounded() {
        assert_eq!(serde_json::from_str::<Bytes>("1").map(Bytes::get).ok(), Some(1));
        for text in ["0", "-1", "9223372036854775808", "18446744073709551615", "1.5", "\"1\"", "null"] {
            assert!(serde_json::from_str::<Bytes>(text).is_err(), "{text} was taken");
        }
    }

    #[test]
    fn sizes_are_shown_in_binary_units() {
        assert_eq!(Bytes::show(1023), "1023 B");
        assert_eq!(Bytes::show(1024), "1.0 KiB");
        assert_eq!(Bytes::show(3 << 29), "1.5 GiB");
        assert_eq!(Bytes::show((1 << 30) - 1), "1.0 GiB");
    }
}
