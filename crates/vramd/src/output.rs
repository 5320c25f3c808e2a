//! How answers are shown: data to standard output, talk to standard error, JSON on request.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};

use clap::ColorChoice;
use comfy_table::{CellAlignment, Table, presets};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use crate::arguments::Global;
use crate::error::CommandError;

#[derive(Debug, Clone, Copy)]
pub enum Tone {
    Good,
    Note,
    Bad,
}

/// Where and how a command talks.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
    color_stdout: bool,
    color_stderr: bool,
}

impl Output {
    pub fn new(global: &Global) -> Self {
        let wanted = |terminal: bool| match global.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        Self {
            json: global.json,
            color_stdout: wanted(io::stdout().is_terminal()),
            color_stderr: wanted(io::stderr().is_terminal()),
        }
    }

    pub fn color_stderr(self) -> bool {
        self.color_stderr
    }

    /// Prints the answer: as JSON when asked to, otherwise as `human` puts it.
    pub fn data<T: Serialize>(self, data: &T, human: impl FnOnce(&T) -> String) -> Result<(), CommandError> {
        let text = if self.json {
            serde_json::to_string_pretty(data).map_err(io::Error::from)?
        } else {
            printable(&human(data)).into_owned()
        };
        Self::print(&text)
    }

    /// Prints one of many answers: JSON goes on one line.
    pub fn line<T: Serialize>(self, data: &T, human: impl FnOnce(&T) -> String) -> Result<(), CommandError> {
        let text = if self.json {
            serde_json::to_string(data).map_err(io::Error::from)?
        } else {
            printable(&human(data)).into_owned()
        };
        Self::print(&text)
    }

    /// Prints text that has no JSON form.
    pub fn print(text: &str) -> Result<(), CommandError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        if !text.ends_with('\n') {
            stdout.write_all(b"\n")?;
        }
        Ok(stdout.flush()?)
    }

    /// Says something to the person at the terminal; whoever reads JSON has it already.
    pub fn say(self, text: &str) {
        if !self.json {
            Self::complain(text);
        }
    }

    pub fn error(self, error: &CommandError) {
        if self.json {
            let body = match error.api() {
                Some(error) => json!({ "error": error }),
                None => json!({ "error": { "message": error.message(), "hint": error.hint() } }),
            };
            Self::complain(&format!("{body:#}"));
            return;
        }
        let label = paint("error:", Tone::Bad, self.color_stderr);
        Self::complain(&format!("{label} {}", error.message()));
        if let Some(hint) = error.hint() {
            Self::complain(&format!("{} {hint}", paint("hint:", Tone::Note, self.color_stderr)));
        }
    }

    /// A word in a color that fits what it says, if standard output takes colors.
    pub fn tone(self, word: &str, tone: Tone) -> String {
        paint(word, tone, self.color_stdout)
    }

    fn complain(text: &str) {
        // Nobody is left to tell when standard error is closed.
        let _ = writeln!(io::stderr(), "{}", printable(text));
    }
}

fn paint(word: &str, tone: Tone, color: bool) -> String {
    let [good, note, bad, plain] = COLORS;
    let begin = match tone {
        _ if !color => return word.to_owned(),
        Tone::Good => good,
        Tone::Note => note,
        Tone::Bad => bad,
    };
    format!("{begin}{word}{plain}")
}

/// Good, note, bad, and the end of each.
const COLORS: [&str; 4] = ["\x1b[1;32m", "\x1b[1;33m", "\x1b[1;31m", "\x1b[0m"];

/// The text with what would command a terminal made visible: names come from others. Our own colors stay.
fn printable(text: &str) -> Cow<'_, str> {
    let commands = |c: char| c.is_control() && c != '\n';
    if !text.contains(commands) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(commands) {
        let (before, from) = rest.split_at(at);
        clean.push_str(before);
        let color = COLORS.iter().find(|color| from.starts_with(**color));
        let length = color.map_or_else(|| from.chars().next().map_or(0, char::len_utf8), |color| color.len());
        let (found, after) = from.split_at(length);
        match color {
            Some(color) => clean.push_str(color),
            None => clean.extend(found.chars().flat_map(char::escape_default)),
        }
        rest = after;
    }
    clean.push_str(rest);
    Cow::Owned(clean)
}

/// A table without lines, as `docker ps` prints one. Columns whose name begins with `>` are numbers.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.map(|name| name.trim_start_matches('>')));
    for row in rows {
        table.add_row(row);
    }
    for (column, name) in table.column_iter_mut().zip(header) {
        column.set_padding((0, 3));
        if name.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Names and values below each other.
pub fn list(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().fold(String::new(), |mut text, (name, value)| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:width$}   {value}");
        text
    })
}

/// The word that a value has in JSON.
pub fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

pub fn percent(ratio: f64) -> String {
    format!("{:.0} %", ratio * 100.0)
}

/// `4m12s`: the two largest units.
pub fn span(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (days, hours, minutes, rest) =
        (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m{rest:02}s"),
        (0, _, _) => format!("{hours}h{minutes:02}m"),
        (_, _, _) => format!("{days}d{hours:02}h"),
    }
}

pub fn time_until(end: Timestamp) -> String {
    format!("in {}", span(end.as_second() - Timestamp::now().as_second()))
}

pub fn time_since(begin: Timestamp) -> String {
    format!("{} ago", span(Timestamp::now().as_second() - begin.as_second()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units_at_most() {
        for (seconds, text) in
            [(-5, "0s"), (59, "59s"), (252, "4m12s"), (3600, "1h00m"), (90061, "1d01h"), (864_000, "10d00h")]
        {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn what_others_named_commands_no_terminal() {
        let hostile = "a\x1b]0;title\x07\x1b[2J\tb\r\u{9b}";
        assert_eq!(printable(hostile), "a\\u{1b}]0;title\\u{7}\\u{1b}[2J\\tb\\r\\u{9b}");
        for plain in ["two\nlines", &paint("bad", Tone::Bad, true)] {
            assert_eq!(printable(plain), plain);
        }
    }

    #[test]
    fn tables_are_aligned_and_end_without_blanks() {
        let text =
            table(["NAME", ">SIZE"], [["a".into(), "1 B".into()], ["longer".into(), "10.0 GiB".into()]]);
        assert_eq!(text, "NAME         SIZE\na             1 B\nlonger   10.0 GiB");
    }
}
