//! What simulated devices to make, as data and as text.

use vramd_api::{Bytes, parse_size};

const DEFAULT_GRANULARITY_BYTES: u64 = 64 << 10;
const MAX_DEVICES: usize = 64;

/// One simulated device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// The number in its id `sim:N`.
    pub ordinal: u32,
    pub total_bytes: u64,
    /// The speed of its one link to the host; unset: as fast as the host copies.
    pub bytes_per_second: Option<u64>,
    /// A power of two, at least 4 KiB.
    pub granularity_bytes: u64,
}

impl Spec {
    pub fn new(ordinal: u32, total_bytes: u64) -> Self {
        Self { ordinal, total_bytes, bytes_per_second: None, granularity_bytes: DEFAULT_GRANULARITY_BYTES }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if !self.granularity_bytes.is_power_of_two() || self.granularity_bytes < 4096 {
            return Err("the granularity is a power of two of at least 4 KiB".to_owned());
        }
        if self.total_bytes < self.granularity_bytes || self.total_bytes > Bytes::MAX {
            return Err(format!(
                "a device has at least {} and at most 2^63 - 1 bytes",
                Bytes::show(self.granularity_bytes)
            ));
        }
        if self.bytes_per_second == Some(0) {
            return Err("the speed is above 0; leave it out for full speed".to_owned());
        }
        Ok(())
    }
}

/// A text or a [`Spec`] that describes no simulated devices, with what is wrong about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} describes no simulated device: {reason}")]
pub struct BadSpec {
    pub text: String,
    pub reason: String,
}

/// Reads `24GiB,8GiB@12GiB`: devices from `sim:0` on, each with its size and, after `@`, the speed of its link in
/// bytes per second. Sizes are written as everywhere in vramd.
pub fn parse_spec(text: &str) -> Result<Vec<Spec>, BadSpec> {
    let bad = |text: &str, reason: String| BadSpec { text: text.chars().take(80).collect(), reason };
    let mut specs = Vec::new();
    let mut sum = 0_u64;
    for (entry, ordinal) in text.split(',').zip(0_u32..) {
        if specs.len() == MAX_DEVICES {
            return Err(bad(text, format!("at most {MAX_DEVICES} devices can be simulated")));
        }
        if entry.trim().is_empty() {
            return Err(bad(text, "a size is missing; write 24GiB, or 24GiB,8GiB@12GiB".to_owned()));
        }
        let (size, speed) = entry.split_once('@').map_or((entry, None), |(size, speed)| (size, Some(speed)));
        let parse = |text: &str| parse_size(text).map_err(|error| bad(entry, error.to_string()));
        let mut spec = Spec::new(ordinal, parse(size)?);
        spec.bytes_per_second =
            speed.map(|speed| parse(speed.strip_suffix("/s").unwrap_or(speed))).transpose()?;
        spec.check().map_err(|reason| bad(entry, reason))?;
        sum = sum
            .checked_add(spec.total_bytes)
            .filter(|sum| *sum <= Bytes::MAX)
            .ok_or_else(|| bad(text, "all devices together are larger than 2^63 - 1 bytes".to_owned()))?;
        specs.push(spec);
    }
    Ok(specs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_people_write_them() {
        let fast = Spec::new(0, 24 << 30);
        let slow = Spec { bytes_per_second: Some(12 << 30), ..Spec::new(1, 8 << 30) };
        for text in ["24GiB,8GiB@12GiB", " 24G , 8GiB @ 12GiB/s"] {
            assert_eq!(parse_spec(text), Ok(vec![fast, slow]), "{text}");
        }
    }

    #[test]
    fn what_is_no_device_is_refused_with_the_reason() {
        let many = vec!["1GiB"; 65].join(",");
        for (text, reason) in [
            ("", "missing"),
            ("24GiB,", "missing"),
            ("0", "at least"),
            ("1KiB", "at least"),
            ("lots", "not a size"),
            ("24GiB@", "not a size"),
            ("24GiB@0", "above 0"),
            ("9223372036854775808", "2^63"),
            ("8388607TiB,8388607TiB", "together"),
            (many.as_str(), "at most 64"),
        ] {
            let error = parse_spec(text).unwrap_err();
            assert!(error.reason.contains(reason), "{text:?}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in ".{0,40}") {
            if let Ok(specs) = parse_spec(&text) {
                assert!(specs.iter().all(|spec| spec.check().is_ok()));
            }
        }

        #[test]
        fn what_is_written_is_what_is_read(sizes in proptest::collection::vec((65536_u64..1 << 50, proptest::option::of(1_u64..1 << 40)), 1..=64)) {
            let text: Vec<String> = sizes
                .iter()
                .map(|(size, speed)| speed.map_or(size.to_string(), |speed| format!("{size}@{speed}")))
                .collect();
            let read: Vec<_> = parse_spec(&text.join(",")).unwrap().iter().map(|spec| (spec.total_bytes, spec.bytes_per_second)).collect();
            assert_eq!(read, sizes);
        }
    }
}
