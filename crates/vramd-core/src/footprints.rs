//! What runs of models take beside the weights: learned from their peaks, by model, device and shape.
//!
//! What is reserved next is the largest of the last few peaks: too much costs others room for a while, too little costs the run.

use std::collections::BTreeMap;

use imbl::OrdMap;
use jiff::Timestamp;
use vramd_api::{Basis, DeviceId, Footprint, ModelName, RECENT_PEAKS};

/// As many are remembered; then the one that was learned from longest ago goes.
const REMEMBERED: usize = 4096;

/// One run that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    pub model: ModelName,
    pub device: DeviceId,
    pub shape: Vec<u64>,
    pub estimate_bytes: Option<u64>,
    pub reserved_bytes: u64,
    pub peak_bytes: u64,
    pub ended_at: Timestamp,
}

type Key = (ModelName, DeviceId, Vec<u64>);

/// Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Footprints(OrdMap<Key, Footprint>);

impl Footprints {
    pub fn iter(&self) -> impl Iterator<Item = &Footprint> {
        self.0.values()
    }

    /// Takes one from an earlier start.
    pub fn insert(&mut self, footprint: Footprint) {
        self.0.insert(key(&footprint), footprint);
    }

    /// Learns from a run; answers what is known now, and what was forgotten for it.
    pub fn learn(&mut self, run: Run) -> (Footprint, Option<Footprint>) {
        // Without a sign for nothing.
        let rounded = |share: f64| (share * 1000.0).round() / 1000.0 + 0.0;
        let error = rounded(run.reserved_bytes as f64 / run.peak_bytes.max(1) as f64 - 1.0);
        let key: Key = (run.model, run.device, run.shape);
        let full = self.0.len() >= REMEMBERED && !self.0.contains_key(&key);
        let oldest = self.0.values().min_by_key(|one| one.updated_at).filter(|_| full).map(self::key);
        let forgotten = oldest.and_then(|oldest| self.0.remove(&oldest));
        let (model, device_id, shape) = key.clone();
        let footprint = self.0.entry(key).or_insert_with(|| Footprint {
            model,
            device_id,
            shape,
            estimate_bytes: None,
            learned_bytes: 0,
            recent_peak_bytes: Vec::new(),
            error,
            mean_error: 0.0,
            run_count: 0,
            updated_at: run.ended_at,
        });
        if footprint.recent_peak_bytes.len() >= RECENT_PEAKS {
            footprint.recent_peak_bytes.remove(0);
        }
        footprint.recent_peak_bytes.push(run.peak_bytes);
        footprint.learned_bytes = footprint.recent_peak_bytes.iter().copied().max().unwrap_or_default();
        footprint.estimate_bytes = run.estimate_bytes.or(footprint.estimate_bytes);
        footprint.run_count += 1;
        footprint.error = error;
        let before = footprint.mean_error;
        footprint.mean_error += (error.abs() - before) / footprint.run_count as f64;
        footprint.updated_at = run.ended_at;
        (footprint.clone(), forgotten)
    }

    /// Forgets all runs of a model; answers what was known of them.
    pub fn forget(&mut self, model: &ModelName) -> Vec<Footprint> {
        let known: Vec<Key> = self.0.keys().filter(|(of, ..)| of == model).cloned().collect();
        known.iter().filter_map(|key| self.0.remove(key)).collect()
    }

    /// What a run of that shape took.
    pub fn learned(&self, model: &ModelName, device: &DeviceId, shape: &[u64]) -> Option<u64> {
        self.0.get(&(model.clone(), device.clone(), shape.to_vec())).map(|one| one.learned_bytes)
    }

    /// How much to reserve for a run on a device, and why so much; None if nothing is known at all.
    pub fn expect(
        &self,
        model: &ModelName,
        device: &DeviceId,
        shape: &[u64],
        estimate: Option<u64>,
    ) -> Option<(u64, Basis)> {
        let learned = self.learned(model, device, shape).map(|bytes| (bytes, Basis::Learned));
        let given = estimate.map(|bytes| (bytes, Basis::Estimate));
        let of_others = || Some((self.interpolated(model, device, shape)?, Basis::Interpolated));
        learned.or(given).or_else(of_others)
    }

    fn interpolated(&self, model: &ModelName, device: &DeviceId, shape: &[u64]) -> Option<u64> {
        // Shapes of other lengths count other things.
        let comparable = |one: &&Footprint| {
            one.model == *model && one.device_id == *device && one.shape.len() == shape.len()
        };
        let mut points: BTreeMap<u64, u64> = BTreeMap::new();
        for one in self.0.values().filter(comparable) {
            let bytes = points.entry(product(&one.shape)).or_default();
            *bytes = (*bytes).max(one.learned_bytes);
        }
        let asked = product(shape);
        let below = points.range(..=asked).next_back();
        let above = points.range(asked..).next();
        let part_of = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        Some(match (below, above) {
            (Some((x, y)), Some((to_x, to_y))) => {
                let along = part_of(asked - x, to_x - x);
                (*y as f64 + (*to_y as f64 - *y as f64) * along).ceil() as u64
            }
            (Some((x, y)), None) => (*y as f64 * part_of(asked, *x)).ceil() as u64,
            (None, Some((_, y))) => *y,
            (None, None) => return None,
        })
    }
}

fn product(shape: &[u64]) -> u64 {
    shape.iter().fold(1, |product, dimension| product.saturating_mul(*dimension))
}

fn key(footprint: &Footprint) -> Key {
    (footprint.model.clone(), footprint.device_id.clone(), footprint.shape.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(shape: &[u64], reserved_bytes: u64, peak_bytes: u64) -> Run {
        Run {
            model: "a".parse().expect("a name"),
            device: "sim:0".parse().expect("a device"),
            shape: shape.to_vec(),
            estimate_bytes: None,
            reserved_bytes,
            peak_bytes,
            ended_at: Timestamp::UNIX_EPOCH,
        }
    }

    fn expected(known: &Footprints, shape: &[u64], estimate: Option<u64>) -> Option<(u64, Basis)> {
        let Run { model, device, .. } = run(shape, 0, 0);
        known.expect(&model, &device, shape, estimate)
    }

    #[test]
    fn what_runs_took_goes_before_what_is_said() {
        let mut known = Footprints::default();
        assert_eq!(expected(&known, &[1], None), None);
        assert_eq!(expected(&known, &[1], Some(700)), Some((700, Basis::Estimate)));
        known.learn(run(&[1], 700, 400));
        let (footprint, _) = known.learn(run(&[1], 400, 500));
        assert_eq!(expected(&known, &[1], Some(700)), Some((500, Basis::Learned)));
        assert!((footprint.error + 0.2).abs() < 1e-9 && (footprint.mean_error - 0.475).abs() < 1e-9);
        // A peak of long ago is no peak any more.
        for _ in 0..RECENT_PEAKS {
            known.learn(run(&[1], 500, 300));
        }
        assert_eq!(expected(&known, &[1], None), Some((300, Basis::Learned)));
    }

    #[test]
    fn other_shapes_say_something_of_one_that_never_ran() {
        let mut known = Footprints::default();
        known.learn(run(&[2, 10], 1, 1000));
        known.learn(run(&[4, 10], 1, 3000));
        let bytes = |shape: &[u64]| expected(&known, shape, None);
        assert_eq!(bytes(&[3, 10]), Some((2000, Basis::Interpolated)));
        assert_eq!(bytes(&[8, 10]), Some((6000, Basis::Interpolated)));
        assert_eq!(bytes(&[1, 10]), Some((1000, Basis::Interpolated)));
        assert_eq!(bytes(&[20, 1]), Some((1000, Basis::Interpolated)), "as many elements as one that ran");
        assert_eq!(bytes(&[20]), None, "one number counts something else than two");
        assert_eq!(bytes(&[u64::MAX, u64::MAX]).map(|(_, basis)| basis), Some(Basis::Interpolated));
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many() {
        let mut known = Footprints::default();
        for at in 0..REMEMBERED as u64 {
            let ended_at = Timestamp::from_second(at.cast_signed()).expect("a time");
            assert_eq!(known.learn(Run { ended_at, ..run(&[at], 1, 1) }).1, None);
        }
        let (_, forgotten) = known.learn(run(&[u64::MAX], 1, 1));
        assert_eq!(forgotten.map(|one| one.shape), Some(vec![0]));
        assert_eq!(known.forget(&"a".parse().expect("a name")).len(), REMEMBERED);
        assert_eq!(known.iter().count(), 0);
    }
}
