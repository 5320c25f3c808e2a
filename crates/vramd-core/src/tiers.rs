//! Whether a component that has to go from a device is kept in RAM.

/// What is expected of a component, kept in RAM or not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prospect {
    pub uses_per_second: f64,
    /// How long it would stay without being used.
    pub kept_seconds: f64,
    /// To get it back from its files.
    pub read_seconds: f64,
    /// To get it back from RAM.
    pub return_seconds: f64,
    /// To bring it to RAM now, while somebody waits for its place.
    pub leave_seconds: f64,
}

impl Prospect {
    /// The wait that it saves later, by what is expected, is longer than the one that it costs now.
    pub fn pays(&self) -> bool {
        let uses = (self.uses_per_second * self.kept_seconds).min(1.0);
        uses * (self.read_seconds - self.return_seconds) > self.leave_seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_and_slow_to_read_is_kept() {
        // 20 GB: 6 s from the disk, 1 s from RAM, 2 s to get there.
        let often = Prospect {
            uses_per_second: 1.0 / 300.0,
            kept_seconds: 300.0,
            read_seconds: 6.0,
            return_seconds: 1.0,
            leave_seconds: 2.0,
        };
        assert!(often.pays());
        assert!(!Prospect { uses_per_second: 1.0 / 1000.0, ..often }.pays());
        assert!(!Prospect { read_seconds: 2.5, ..often }.pays());
        assert!(!Prospect { kept_seconds: 60.0, ..often }.pays());
        // It comes back once, however often it is used then.
        assert!(!Prospect { uses_per_second: 10.0, leave_seconds: 5.5, ..often }.pays());
    }
}
