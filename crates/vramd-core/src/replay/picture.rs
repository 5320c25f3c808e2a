//! A replay as an SVG: what lies where, over the events, and how fragmented the pool is below it.
//!
//! Blocks that can be seen are rectangles. What is smaller than [`CELL`] is gathered in cells of that size, so that the
//! file has some megabytes at most however long the trace is.

use std::fmt::Write;

use vramd_api::Bytes;

use super::trace::{DeviceTrace, Step};
use super::{Placed, Replay};

const WIDTH: usize = 1200;
const HEIGHT: usize = 720;
const LEFT: f64 = 96.0;
const PLOT_WIDTH: f64 = 1072.0;
const TOP: f64 = 84.0;
const PLOT_HEIGHT: f64 = 440.0;
const LOWER_TOP: f64 = 568.0;
const LOWER_HEIGHT: f64 = 88.0;
/// Pixels on a side.
const CELL: f64 = 2.0;
const COLUMNS: usize = (PLOT_WIDTH / CELL) as usize;
const ROWS: usize = (PLOT_HEIGHT / CELL) as usize;
/// A block with fewer pixels than this is gathered in cells.
const SEEN_AREA: f64 = 12.0;
/// How full a cell is: shades of its color.
const SHADES: usize = 4;

/// Classes of sizes: what is below the bound, its name, and its color on light and dark ground.
const CLASSES: [(u64, &str, &str, &str); 6] = [
    (64 << 10, "below 64 KiB", "#8a8f98", "#8b929c"),
    (1 << 20, "64 KiB to 1 MiB", "#2a9d8f", "#3fbfae"),
    (16 << 20, "1 to 16 MiB", "#3a7bd5", "#5b9bf0"),
    (256 << 20, "16 to 256 MiB", "#7a5cc8", "#a08bea"),
    (1 << 30, "256 MiB to 1 GiB", "#e09f3e", "#e8b45c"),
    (u64::MAX, "1 GiB and more", "#b5543c", "#dd7f63"),
];

/// Draws the replay of `trace`.
pub fn draw(trace: &DeviceTrace, replay: &Replay, title: &str) -> String {
    let mut svg = String::new();
    let picture = Picture { trace, replay, events: trace.events.len().max(1) as f64 };
    // Writing to a string cannot fail.
    let _ = picture.write(&mut svg, title);
    svg
}

struct Picture<'a> {
    trace: &'a DeviceTrace,
    replay: &'a Replay,
    events: f64,
}

impl Picture<'_> {
    fn write(&self, svg: &mut String, title: &str) -> std::fmt::Result {
        let report = &self.replay.report;
        let title = escape(title);
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="12"><title>{title}</title>"#
        )?;
        style(svg)?;
        writeln!(svg, r#"<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>"#)?;
        writeln!(svg, r#"<text class="title" x="{LEFT}" y="28">{title}</text>"#)?;
        let refusals = match report.refusals.count {
            0 => "nothing refused".to_owned(),
            count => format!("{} refused", grouped(count)),
        };
        writeln!(
            svg,
            r#"<text class="quiet" x="{LEFT}" y="46">pool {}, live peak {}, highest address {}, {refusals}</text>"#,
            Bytes::show(report.pool_bytes),
            Bytes::show(report.peak_live_bytes),
            Bytes::show(report.peak_address_bytes),
        )?;
        legend(svg)?;
        self.axes(svg)?;
        self.blocks(svg)?;
        self.marks(svg)?;
        self.fragmentation(svg)?;
        svg.push_str("</svg>\n");
        Ok(())
    }

    fn x(&self, event: usize) -> f64 {
        LEFT + event as f64 / self.events * PLOT_WIDTH
    }

    fn y(&self, address: u64) -> f64 {
        let pool = self.replay.report.pool_bytes.max(1) as f64;
        TOP + PLOT_HEIGHT - address as f64 / pool * PLOT_HEIGHT
    }

    fn axes(&self, svg: &mut String) -> std::fmt::Result {
        let right = LEFT + PLOT_WIDTH;
        writeln!(
            svg,
            r#"<rect class="plot" x="{LEFT}" y="{TOP}" width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}"/><rect class="plot" x="{LEFT}" y="{LOWER_TOP}" width="{PLOT_WIDTH}" height="{LOWER_HEIGHT}"/>"#
        )?;
        for part in 0..=4 {
            let address = (u128::from(self.replay.report.pool_bytes) * part / 4) as u64;
            let y = self.y(address);
            writeln!(
                svg,
                r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/><text class="quiet" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                LEFT - 8.0,
                y + 4.0,
                Bytes::show(address)
            )?;
        }
        for (share, text) in [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")] {
            let y = LOWER_TOP + LOWER_HEIGHT * (1.0 - share);
            writeln!(
                svg,
                r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/><text class="quiet" x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#,
                LEFT - 8.0,
                y + 4.0
            )?;
        }
        let timed = self.replay.report.milliseconds > 0.0;
        let count = self.trace.events.len();
        for part in 0..=5 {
            let event = count * part / 5;
            let (x, at) = (self.x(event), self.trace.events.get(event).or(self.trace.events.last()));
            let anchor = match part {
                0 => "start",
                5 => "end",
                _ => "middle",
            };
            let below = LOWER_TOP + LOWER_HEIGHT;
            writeln!(
                svg,
                r#"<text class="quiet" x="{x:.1}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
                below + 18.0,
                grouped(event as u64)
            )?;
            if let Some(at) = at.filter(|_| timed) {
                writeln!(
                    svg,
                    r#"<text class="quiet" x="{x:.1}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
                    below + 34.0,
                    span(at.at_micros)
                )?;
            }
        }
        let what = if timed { "event, and time since the first" } else { "event" };
        writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{what}</text>"#,
            LEFT + PLOT_WIDTH / 2.0,
            LOWER_TOP + LOWER_HEIGHT + 54.0
        )?;
        for (middle, text) in [
            (TOP + PLOT_HEIGHT / 2.0, "address in the pool"),
            (LOWER_TOP + LOWER_HEIGHT / 2.0, "fragmentation"),
        ] {
            writeln!(
                svg,
                r#"<text transform="translate(18 {middle:.1}) rotate(-90)" text-anchor="middle">{text}</text>"#
            )?;
        }
        Ok(())
    }

    fn blocks(&self, svg: &mut String) -> std::fmt::Result {
        let mut cells = Cells::new();
        let mut paths: [String; CLASSES.len()] = Default::default();
        for block in &self.replay.placed {
            let (left, right) = (self.x(block.begin), self.x(block.end));
            let (top, bottom) = (self.y(block.offset + block.bytes), self.y(block.offset));
            let (width, height) = (right - left, bottom - top);
            if width < CELL || height < CELL || width * height < SEEN_AREA {
                let columns = ((left - LEFT) / CELL, (right - LEFT) / CELL);
                cells.add(class(block), columns, ((top - TOP) / CELL, (bottom - TOP) / CELL));
            } else {
                write!(paths[class(block)], "M{left:.1} {top:.1}h{width:.1}v{height:.1}h-{width:.1}z")?;
            }
        }
        cells.write(svg)?;
        for (class, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
            writeln!(svg, r#"<path class="block c{class}" d="{path}"/>"#)?;
        }
        Ok(())
    }

    /// Refusals above the plot, gaps through it; one for each pixel at most.
    fn marks(&self, svg: &mut String) -> std::fmt::Result {
        let mut drawn = f64::NEG_INFINITY;
        for &event in &self.replay.refused {
            let x = self.x(event).round();
            if x > drawn {
                drawn = x;
                write!(svg, r#"<path class="refused" d="M{x} {TOP}l-4 -9h8z"/>"#)?;
            }
        }
        drawn = f64::NEG_INFINITY;
        let gaps = self.trace.events.iter().enumerate().filter(|(_, event)| event.step == Step::Gap);
        for (event, _) in gaps {
            let x = self.x(event).round();
            if x > drawn {
                drawn = x;
                write!(svg, r#"<path class="gap" d="M{x} {TOP}v{PLOT_HEIGHT}"/>"#)?;
            }
        }
        Ok(())
    }

    fn fragmentation(&self, svg: &mut String) -> std::fmt::Result {
        let samples = &self.replay.report.fragmentation.samples;
        let mut line = String::new();
        for sample in samples {
            let y = LOWER_TOP + LOWER_HEIGHT * (1.0 - sample.fragmentation);
            let letter = if line.is_empty() { 'M' } else { 'L' };
            write!(line, "{letter}{:.1} {y:.1}", self.x(sample.event))?;
        }
        if samples.is_empty() { Ok(()) } else { writeln!(svg, r#"<path class="line" d="{line}"/>"#) }
    }
}

fn class(block: &Placed) -> usize {
    CLASSES.iter().position(|(below, ..)| block.bytes < *below).unwrap_or(CLASSES.len() - 1)
}

fn style(svg: &mut String) -> std::fmt::Result {
    writeln!(
        svg,
        "<style>.ground{{fill:#fff}}.plot{{fill:#f6f7f9}}text{{fill:#1f2328}}.quiet{{fill:#59626d}}\
         .title{{font-size:17px;font-weight:600}}.grid{{stroke:#d5d9df;fill:none}}\
         .block{{stroke:#fff;stroke-width:.5}}.line{{stroke:#1f2328;stroke-width:1.5;fill:none}}\
         .refused{{fill:#d1242f}}.gap{{stroke:#d1242f;stroke-dasharray:4 3}}"
    )?;
    for (number, (_, _, light, _)) in CLASSES.iter().enumerate() {
        write!(svg, ".c{number}{{fill:{light}}}")?;
    }
    svg.push_str(
        "@media(prefers-color-scheme:dark){.ground{fill:#14171c}.plot{fill:#1b1f26}text{fill:#e6e9ee}\
         .quiet{fill:#a0a8b4}.grid{stroke:#323842}.block{stroke:#14171c}.line{stroke:#e6e9ee}.refused{fill:#ff7b72}\
         .gap{stroke:#ff7b72}",
    );
    for (number, (_, _, _, dark)) in CLASSES.iter().enumerate() {
        write!(svg, ".c{number}{{fill:{dark}}}")?;
    }
    svg.push_str("}</style>\n");
    Ok(())
}

fn legend(svg: &mut String) -> std::fmt::Result {
    for (number, (_, name, ..)) in CLASSES.iter().enumerate() {
        let x = LEFT + 140.0 * number as f64;
        writeln!(
            svg,
            r#"<rect class="c{number}" x="{x}" y="55" width="12" height="12" rx="2"/><text class="quiet" x="{}" y="65">{name}</text>"#,
            x + 17.0
        )?;
    }
    let x = LEFT + 140.0 * CLASSES.len() as f64;
    writeln!(
        svg,
        r#"<path class="refused" d="M{} 66l-5 -10h10z"/><text class="quiet" x="{}" y="65">refused</text><path class="gap" d="M{} 55v12"/><text class="quiet" x="{}" y="65">gap in the trace</text>"#,
        x + 5.0,
        x + 15.0,
        x + 80.0,
        x + 86.0
    )
}

/// What is too small to be seen alone: how much of each cell each class covers.
struct Cells {
    /// By class, then row, then column: covered in this column only, and from this one on.
    here: Vec<f32>,
    onwards: Vec<f32>,
}

impl Cells {
    fn new() -> Self {
        let cells = vec![0.0; CLASSES.len() * ROWS * (COLUMNS + 1)];
        Self { here: cells.clone(), onwards: cells }
    }

    fn index(class: usize, row: usize, column: usize) -> usize {
        (class * ROWS + row) * (COLUMNS + 1) + column
    }

    /// Adds a rectangle, in cells.
    fn add(&mut self, class: usize, (left, right): (f64, f64), (top, bottom): (f64, f64)) {
        let (first, last) = (left.floor(), right.floor());
        for row in top as usize..(bottom.ceil() as usize).min(ROWS) {
            let height = bottom.min(row as f64 + 1.0) - top.max(row as f64);
            let begin = Self::index(class, row, first as usize);
            let end = Self::index(class, row, (last as usize).min(COLUMNS));
            // Full from `first` on, less the part before `left`; ended at `last`, but for the part before `right`.
            self.onwards[begin] += height as f32;
            self.here[begin] -= (height * (left - first)) as f32;
            self.onwards[end] -= height as f32;
            self.here[end] += (height * (right - last)) as f32;
        }
    }

    /// Runs of cells of one class and shade, a path for each of these.
    fn write(&self, svg: &mut String) -> std::fmt::Result {
        let mut paths = vec![String::new(); CLASSES.len() * SHADES];
        for row in 0..ROWS {
            let mut onwards = [0.0; CLASSES.len()];
            let mut run: Option<(usize, usize)> = None;
            for column in 0..=COLUMNS {
                let kind = if column < COLUMNS { self.kind(row, column, &mut onwards) } else { None };
                if run.map(|(kind, _)| kind) == kind {
                    continue;
                }
                if let Some((kind, begin)) = run {
                    let (x, y) = (LEFT + begin as f64 * CELL, TOP + row as f64 * CELL);
                    let width = (column - begin) as f64 * CELL;
                    write!(paths[kind], "M{x} {y}h{width}v{CELL}h-{width}z")?;
                }
                run = kind.map(|kind| (kind, column));
            }
        }
        for (kind, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
            let (class, shade) = (kind / SHADES, kind % SHADES);
            let opacity = (shade + 1) as f64 / SHADES as f64;
            writeln!(svg, r#"<path class="c{class}" fill-opacity="{opacity}" d="{path}"/>"#)?;
        }
        Ok(())
    }

    /// The class that covers most of the cell, and the shade for all of them.
    fn kind(&self, row: usize, column: usize, onwards: &mut [f32; CLASSES.len()]) -> Option<usize> {
        let (mut all, mut most, mut most_of) = (0.0, 0.0, 0);
        for (class, onwards) in onwards.iter_mut().enumerate() {
            let index = Self::index(class, row, column);
            *onwards += self.onwards[index];
            let covered = *onwards + self.here[index];
            all += covered;
            if covered > most {
                (most, most_of) = (covered, class);
            }
        }
        // Below a hundredth there is more rounding than block.
        (all > 0.01).then(|| most_of * SHADES + ((all * SHADES as f32) as usize).min(SHADES - 1))
    }
}

/// `12,345`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn span(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{micros} µs"),
        10_000..10_000_000 => format!("{:.0} ms", micros as f64 / 1e3),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

pub(crate) fn escape(text: &str) -> String {
    let plain = text.chars().filter(|char| !char.is_control());
    plain.fold(String::new(), |mut escaped, char| {
        match char {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            other => escaped.push(other),
        }
        escaped
    })
}
