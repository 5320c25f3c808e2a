//! How a model's components are spread over devices when no single one is to hold all of them.
//!
//! Whatever passes between two components on different devices crosses a link at every run, so as few devices as can be; of
//! as few, those on which all is loaded soonest by the rates that loads came to, since loads to different devices run side by
//! side; then those that stay emptiest.

/// More ways than these are not compared one by one.
const EXACT: usize = 4096;

/// A device that components may go to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// What it can take.
    pub bytes: u64,
    /// Of all that it has.
    pub total_bytes: u64,
    /// At which loads to it go.
    pub bytes_per_second: f64,
    /// Other components of the model are there already.
    pub is_used: bool,
}

/// Where each of `parts` goes, an index of `places`, and how many seconds all of them take to load; None if they do not fit. A part
/// is its size on each place, None where it can never be.
pub fn split(parts: &[Vec<Option<u64>>], places: &[Place]) -> Option<(Vec<usize>, f64)> {
    let takes =
        |at: &usize| parts.iter().any(|part| part[*at].is_some_and(|bytes| bytes <= places[*at].bytes));
    let open: Vec<usize> = (0..places.len()).filter(takes).collect();
    let ways = (0..parts.len()).try_fold(1_usize, |ways, _| ways.checked_mul(open.len()));
    let best = if ways.is_some_and(|ways| ways <= EXACT) {
        let all = every_way(parts.len(), open.len())
            .map(|way| way.into_iter().map(|at| open[at]).collect::<Vec<_>>());
        let costs = all.filter_map(|way| Some((Cost::of(parts, places, &way)?, way)));
        costs.min_by(|(a, _), (b, _)| {
            let devices = a.devices.cmp(&b.devices);
            devices.then(a.seconds.total_cmp(&b.seconds)).then(a.fullest.total_cmp(&b.fullest))
        })
    } else {
        largest_first(parts, places).and_then(|way| Some((Cost::of(parts, places, &way)?, way)))
    };
    best.map(|(cost, way)| (way, cost.seconds))
}

struct Cost {
    devices: usize,
    seconds: f64,
    fullest: f64,
}

impl Cost {
    /// None: it does not fit.
    fn of(parts: &[Vec<Option<u64>>], places: &[Place], way: &[usize]) -> Option<Self> {
        let mut taken = vec![None::<u64>; places.len()];
        for (part, at) in parts.iter().zip(way) {
            let sum = taken[*at].unwrap_or(0).checked_add(part[*at]?)?;
            taken[*at] = Some(sum).filter(|sum| *sum <= places[*at].bytes);
            taken[*at]?;
        }
        let mut cost = Self { devices: 0, seconds: 0.0, fullest: 0.0 };
        for (taken, place) in taken.iter().zip(places) {
            cost.devices += usize::from(taken.is_some() || place.is_used);
            let Some(bytes) = *taken else { continue };
            let left = (place.bytes - bytes) as f64 / place.total_bytes.max(1) as f64;
            cost.seconds = cost.seconds.max(bytes as f64 / place.bytes_per_second.max(1.0));
            cost.fullest = cost.fullest.max(1.0 - left);
        }
        Some(cost)
    }
}

/// Every way to put so many parts onto so many places, counted up like a number.
fn every_way(parts: usize, places: usize) -> impl Iterator<Item = Vec<usize>> {
    let mut next = (places > 0).then(|| vec![0; parts]);
    std::iter::from_fn(move || {
        let way = next.take()?;
        let mut after = way.clone();
        for digit in after.iter_mut().rev() {
            *digit += 1;
            if *digit < places {
                next = Some(after);
                break;
            }
            *digit = 0;
        }
        Some(way)
    })
}

/// The largest part first, each to the used place with most room left, or to a new one if it fits on none.
fn largest_first(parts: &[Vec<Option<u64>>], places: &[Place]) -> Option<Vec<usize>> {
    let mut left: Vec<u64> = places.iter().map(|place| place.bytes).collect();
    let mut used: Vec<bool> = places.iter().map(|place| place.is_used).collect();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|part| std::cmp::Reverse(parts[*part].iter().flatten().max().copied()));
    let mut way = vec![0; parts.len()];
    for part in order {
        let fitting = (0..places.len()).filter(|at| parts[part][*at].is_some_and(|bytes| bytes <= left[*at]));
        let at = fitting.max_by_key(|at| (used[*at], left[*at]))?;
        left[at] -= parts[part][at]?;
        used[at] = true;
        way[part] = at;
    }
    Some(way)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(bytes: u64, bytes_per_second: f64) -> Place {
        Place { bytes, total_bytes: 100, bytes_per_second, is_used: false }
    }

    fn everywhere(sizes: &[u64], places: usize) -> Vec<Vec<Option<u64>>> {
        sizes.iter().map(|size| vec![Some(*size); places]).collect()
    }

    #[test]
    fn few_devices_go_before_fast_ones_and_fast_ones_before_empty_ones() {
        let parts = everywhere(&[40, 20], 2);
        let ways = |places: [Place; 2]| split(&parts, &places).map(|(way, _)| way);
        assert_eq!(ways([place(60, 1.0), place(50, 9.0)]), Some(vec![0, 0]), "one device is enough");
        assert_eq!(
            ways([place(50, 1.0), place(50, 9.0)]),
            Some(vec![1, 0]),
            "the larger part by the faster link"
        );
        assert_eq!(ways([place(50, 9.0), place(50, 1.0)]), Some(vec![0, 1]));
        assert_eq!(ways([place(30, 1.0), place(50, 9.0)]), Some(vec![1, 0]));
        assert_eq!(ways([place(30, 1.0), place(30, 9.0)]), None, "the larger part fits nowhere");
        let used = Place { is_used: true, ..place(60, 1.0) };
        assert_eq!(ways([place(60, 9.0), used]), Some(vec![1, 1]), "beside what is there already");
        let (_, seconds) = split(&parts, &[place(50, 4.0), place(50, 5.0)]).expect("it fits");
        assert!((seconds - 8.0).abs() < 1e-9, "both load at the same time: {seconds}");
    }

    #[test]
    fn a_part_stays_off_devices_that_could_never_hold_it() {
        let parts = vec![vec![None, Some(30)], vec![Some(10), None]];
        assert_eq!(split(&parts, &[place(90, 1.0), place(90, 1.0)]).map(|(way, _)| way), Some(vec![1, 0]));
        assert_eq!(split(&parts, &[]), None);
    }

    #[test]
    fn many_parts_on_many_devices_are_placed_without_trying_every_way() {
        let parts = everywhere(&[10; 40], 8);
        let places = [place(55, 1.0); 8];
        let (way, _) = split(&parts, &places).expect("8 times 5 fit");
        assert!(Cost::of(&parts, &places, &way).is_some());
        assert_eq!(split(&everywhere(&[10; 41], 8), &places), None);
        // Devices that can take nothing are no ways.
        let parts = everywhere(&[14, 12, 10, 8, 4], 8);
        let mut two = [place(3, 1.0); 8];
        (two[2].bytes, two[5].bytes) = (24, 24);
        assert!(split(&parts, &two).is_some_and(|(way, _)| way.iter().all(|at| [2, 5].contains(at))));
    }
}
