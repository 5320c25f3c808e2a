//! Which device a request goes to, and why.
//!
//! Among the devices that fit, the nearest kind of memory wins (VRAM first, but RAM first for staging buffers), then
//! the device that is emptiest afterwards, then the lowest id.

use vramd_api::{AllocationType, Candidate, DeviceId, MemoryType, Placement, PlacementReason};

/// A device as placement sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    pub device: DeviceId,
    pub memory_type: MemoryType,
    pub available_bytes: u64,
    pub largest_free_bytes: u64,
    /// The share of the device in use once the request is granted, 0 to 1.
    pub used_after: f64,
    pub standing: Standing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Fits,
    NotEnoughMemory,
    Lost,
}

/// Chooses among `offers`; the placement lists all of them, in the order given.
pub fn choose(
    offers: &[Offer],
    allocation_type: AllocationType,
    memory_type: Option<MemoryType>,
) -> (Option<DeviceId>, Placement) {
    let wanted = |offer: &Offer| memory_type.is_none_or(|wanted| wanted == offer.memory_type);
    let chosen =
        offers.iter().filter(|offer| wanted(offer) && offer.standing == Standing::Fits).min_by(|a, b| {
            rank(a.memory_type, allocation_type)
                .cmp(&rank(b.memory_type, allocation_type))
                .then(a.used_after.total_cmp(&b.used_after))
                .then_with(|| a.device.cmp(&b.device))
        });
    let considered: Vec<Candidate> = offers
        .iter()
        .map(|offer| Candidate {
            device_id: offer.device.clone(),
            fits: offer.standing == Standing::Fits,
            available_bytes: offer.available_bytes,
            largest_free_bytes: offer.largest_free_bytes,
            reason: match offer.standing {
                Standing::Lost => PlacementReason::Lost,
                _ if !wanted(offer) => PlacementReason::OtherMemoryType,
                Standing::NotEnoughMemory => PlacementReason::NotEnoughMemory,
                Standing::Fits if Some(offer) == chosen => PlacementReason::Chosen,
                Standing::Fits => PlacementReason::LessPreferred,
            },
        })
        .collect();
    let reason = match chosen {
        Some(offer) if offers.len() == 1 => format!("{} is the device that was asked for", offer.device),
        Some(offer) => format!(
            "{} has {} memory that fits and would be {:.0} % used, the best of {} devices",
            offer.device,
            memory_word(offer.memory_type),
            offer.used_after * 100.0,
            offers.len()
        ),
        None => "no device fits".to_owned(),
    };
    (chosen.map(|offer| offer.device.clone()), Placement { reason, spilled_from: Vec::new(), considered })
}

/// How far a kind of memory is from where it is used: lower is better.
pub fn rank(memory_type: MemoryType, allocation_type: AllocationType) -> u8 {
    let near_the_processor = match memory_type {
        MemoryType::Vram => 0,
        MemoryType::Unified => 1,
        MemoryType::Shared => 2,
        MemoryType::Ram => 3,
        MemoryType::Unknown => 4,
    };
    match (allocation_type, memory_type) {
        (_, MemoryType::Unknown) => 5,
        (AllocationType::Staging, _) => 4 - near_the_processor,
        _ => near_the_processor,
    }
}

fn memory_word(memory_type: MemoryType) -> &'static str {
    match memory_type {
        MemoryType::Ram => "RAM",
        MemoryType::Vram => "VRAM",
        MemoryType::Shared => "shared",
        MemoryType::Unified => "unified",
        MemoryType::Unknown => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(device: &str, memory_type: MemoryType, used_after: f64, standing: Standing) -> Offer {
        Offer {
            device: device.parse().expect("a device id"),
            memory_type,
            available_bytes: 1,
            largest_free_bytes: 1,
            used_after,
            standing,
        }
    }

    #[test]
    fn vram_goes_before_ram_and_the_emptier_before_the_fuller() {
        let offers = [
            offer("cpu:0", MemoryType::Ram, 0.1, Standing::Fits),
            offer("sim:0", MemoryType::Vram, 0.9, Standing::Fits),
            offer("sim:1", MemoryType::Vram, 0.5, Standing::Fits),
            offer("sim:2", MemoryType::Vram, 0.2, Standing::NotEnoughMemory),
        ];
        let (chosen, placement) = choose(&offers, AllocationType::Weights, None);
        assert_eq!(chosen.expect("one fits").as_str(), "sim:1");
        let reasons: Vec<_> = placement.considered.iter().map(|c| c.reason).collect();
        assert_eq!(
            reasons,
            [
                PlacementReason::LessPreferred,
                PlacementReason::LessPreferred,
                PlacementReason::Chosen,
                PlacementReason::NotEnoughMemory
            ]
        );
        let (staging, _) = choose(&offers, AllocationType::Staging, None);
        assert_eq!(staging.expect("one fits").as_str(), "cpu:0");
        let (ram, placement) = choose(&offers, AllocationType::Weights, Some(MemoryType::Ram));
        assert_eq!(ram.expect("one fits").as_str(), "cpu:0");
        assert_eq!(placement.considered[2].reason, PlacementReason::OtherMemoryType);
        assert!(choose(&offers, AllocationType::Weights, Some(MemoryType::Unified)).0.is_none());
    }
}
