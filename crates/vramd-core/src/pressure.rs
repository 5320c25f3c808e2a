//! How full a device is, as a ratio and as a level that does not flutter.

use vramd_api::PressureLevel;

/// A level is entered at its threshold and left only this far below it.
const HYSTERESIS: f64 = 0.03;

const THRESHOLDS: [(PressureLevel, f64); 3] =
    [(PressureLevel::Critical, 0.95), (PressureLevel::High, 0.85), (PressureLevel::Moderate, 0.70)];

/// The level at `ratio` (0 to 1) for a device that was at `before`.
///
/// Going up, a level begins at 0.70, 0.85 and 0.95; going down, it ends 0.03 below.
pub fn level(ratio: f64, before: PressureLevel) -> PressureLevel {
    THRESHOLDS
        .into_iter()
        .find(|(level, threshold)| {
            ratio >= if before >= *level { threshold - HYSTERESIS } else { *threshold }
        })
        .map_or(PressureLevel::Normal, |(level, _)| level)
}

/// 0 to 100: 100 − 70 × ratio² − 30 × fragmentation, both from 0 to 1; 0 for a lost device.
pub fn health_score(ratio: f64, fragmentation: f64, lost: bool) -> u8 {
    if lost {
        return 0;
    }
    let (ratio, fragmentation) = (ratio.clamp(0.0, 1.0), fragmentation.clamp(0.0, 1.0));
    (100.0 - 70.0 * ratio * ratio - 30.0 * fragmentation).round().clamp(0.0, 100.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use PressureLevel::{Critical, High, Moderate, Normal};

    #[test]
    fn a_level_is_left_later_than_it_is_entered() {
        assert_eq!(level(0.849, Moderate), Moderate);
        assert_eq!(level(0.85, Moderate), High);
        assert_eq!(level(0.83, High), High);
        assert_eq!(level(0.81, High), Moderate);
        assert_eq!(level(0.99, Normal), Critical);
        assert_eq!(level(0.10, Critical), Normal);
    }

    #[test]
    fn health_falls_with_pressure_and_fragmentation() {
        assert_eq!(health_score(0.0, 0.0, false), 100);
        assert_eq!(health_score(1.0, 1.0, false), 0);
        assert_eq!(health_score(0.0, 0.0, true), 0);
        assert!(health_score(0.5, 0.0, false) > health_score(0.9, 0.0, false));
    }
}
