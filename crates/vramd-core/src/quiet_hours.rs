//! Quiet hours: the times of day at which work that nobody asked for may be done.
//!
//! Owns how they are written and whether a time is within them. Leaves out which time it is, and what is done then.

use std::fmt;
use std::str::FromStr;

use jiff::civil::Time;

const DAY_MINUTES: u16 = 24 * 60;

/// One window or several, in local time: `02:00-05:00`, `12:00-13:00,22:00-06:00`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuietHours(Vec<Window>);

/// In minutes since midnight. The end is not within it; where it lies before the beginning, it is the next day's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    begin: u16,
    end: u16,
}

impl QuietHours {
    pub fn contain(&self, time: Time) -> bool {
        let minute = u16::from(time.hour().unsigned_abs()) * 60 + u16::from(time.minute().unsigned_abs());
        self.0.iter().any(|window| window.contains(minute))
    }
}

impl Window {
    fn contains(self, minute: u16) -> bool {
        if self.begin < self.end {
            (self.begin..self.end).contains(&minute)
        } else {
            minute >= self.begin || minute < self.end
        }
    }
}

impl FromStr for QuietHours {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl FromStr for Window {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str = "write hours such as 02:00-05:00, several separated by commas, or none";
        let (begin, end) = text
            .trim()
            .split_once('-')
            .and_then(|(begin, end)| Some((minute(begin)?, minute(end)?)))
            .ok_or(SHAPE)?;
        if begin.max(end) >= DAY_MINUTES {
            return Err("a day goes from 00:00 to 23:59; write midnight as 00:00");
        }
        if begin == end {
            return Err(
                "quiet hours begin and end at different times; for the whole day write 00:00-12:00,12:00-00:00",
            );
        }
        Ok(Self { begin, end })
    }
}

/// `HH:MM` as minutes since midnight, which may be past the end of the day.
fn minute(text: &str) -> Option<u16> {
    let two = |digits: &str| -> Option<u16> {
        (digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| digits.parse().ok())
            .flatten()
    };
    let (hours, minutes) = text.split_once(':')?;
    let (hours, minutes) = (two(hours)?, two(minutes)?);
    // 23:75 is no time, not even of the next day.
    (minutes < 60).then_some(hours * 60 + minutes)
}

impl fmt::Display for QuietHours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Window { begin, end }) in self.0.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            write!(f, "{comma}{:02}:{:02}-{:02}:{:02}", begin / 60, begin % 60, end / 60, end % 60)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::time;
    use proptest::prelude::*;

    use super::*;

    fn hours(text: &str) -> QuietHours {
        text.parse().unwrap_or_else(|reason| panic!("{text}: {reason}"))
    }

    #[test]
    fn the_beginning_is_within_and_the_end_is_not() {
        let hours = hours("02:00-05:30");
        for (hour, minute, within) in [(1, 59, false), (2, 0, true), (5, 29, true), (5, 30, false)] {
            assert_eq!(hours.contain(time(hour, minute, 0, 0)), within, "{hour}:{minute}");
        }
        assert!(hours.contain(time(5, 29, 59, 999_999_999)));
    }

    #[test]
    fn a_window_may_go_over_midnight_and_there_may_be_several() {
        let hours = hours("22:00-06:00, 12:00-13:00");
        for (hour, within) in
            [(21, false), (22, true), (0, true), (5, true), (6, false), (12, true), (13, false)]
        {
            assert_eq!(hours.contain(time(hour, 0, 0, 0)), within, "{hour}");
        }
    }

    #[test]
    fn what_is_no_window_is_refused_with_the_reason() {
        for text in [
            "",
            "-",
            "02:00",
            "2:00-5:00",
            "02:00-05:00,",
            "02:00-05:60",
            "02:00-+5:00",
            "02:00:00-05:00",
            "night",
        ] {
            assert!(text.parse::<QuietHours>().unwrap_err().contains("such as 02:00-05:00"), "{text}");
        }
        for text in ["22:00-24:00", "24:00-06:00", "25:00-26:00"] {
            assert!(text.parse::<QuietHours>().unwrap_err().contains("midnight as 00:00"), "{text}");
        }
        assert!("02:00-02:00".parse::<QuietHours>().unwrap_err().contains("different times"));
    }

    proptest! {
        #[test]
        fn a_window_is_the_minutes_from_its_beginning_to_its_end(
            windows in prop::collection::vec((0..DAY_MINUTES, 1..DAY_MINUTES), 1..4),
        ) {
            let mut within = vec![false; usize::from(DAY_MINUTES)];
            let mut written = Vec::new();
            for (begin, length) in windows {
                for minute in begin..begin + length {
                    within[usize::from(minute % DAY_MINUTES)] = true;
                }
                let end = (begin + length) % DAY_MINUTES;
                written.push(format!("{:02}:{:02}-{:02}:{:02}", begin / 60, begin % 60, end / 60, end % 60));
            }
            let written = written.join(",");
            let hours = hours(&written);
            prop_assert_eq!(hours.to_string(), written);
            for (minute, within) in (0_i16..).zip(within) {
                let time = time((minute / 60) as i8, (minute % 60) as i8, 0, 0);
                prop_assert_eq!(hours.contain(time), within, "{}", time);
            }
        }
    }
}
