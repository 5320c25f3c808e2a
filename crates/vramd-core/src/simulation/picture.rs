//! A run as an SVG: a line for each model, and a bar where it was on a device.

use std::fmt::Write;

use super::{Machine, Run};
use crate::replay::picture::escape;

const WIDTH: usize = 1200;
const LEFT: usize = 200;
const COLUMNS: usize = 960;
const TOP: usize = 88;
const LINE: usize = 18;
/// The models that are shown: those that were there for longest.
const MOST: usize = 40;
/// By device, on light and dark ground.
const COLORS: [(&str, &str); 6] = [
    ("#3a7bd5", "#5b9bf0"),
    ("#2a9d8f", "#3fbfae"),
    ("#e09f3e", "#e8b45c"),
    ("#7a5cc8", "#a08bea"),
    ("#b5543c", "#dd7f63"),
    ("#8a8f98", "#8b929c"),
];

/// Draws what was where, and when.
pub fn draw(machine: &Machine, run: &Run, title: &str) -> String {
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut svg, machine, run, title);
    svg
}

fn write(svg: &mut String, machine: &Machine, run: &Run, title: &str) -> std::fmt::Result {
    let end = run.end.max(f64::MIN_POSITIVE);
    // For each model, by columns, the device that it was on.
    let mut columns = vec![vec![None; COLUMNS]; machine.models.len()];
    let mut seconds = vec![0.0; machine.models.len()];
    for one in &run.intervals {
        seconds[one.model] += one.to - one.from;
        let column = |time: f64| ((time / end * COLUMNS as f64) as usize).min(COLUMNS - 1);
        columns[one.model][column(one.from)..=column(one.to)].fill(Some(one.device));
    }
    let mut shown: Vec<usize> = (0..machine.models.len()).filter(|at| seconds[*at] > 0.0).collect();
    shown.sort_by(|a, b| seconds[*b].total_cmp(&seconds[*a]).then(a.cmp(b)));
    let left_out = shown.len().saturating_sub(MOST);
    shown.truncate(MOST);
    let height = TOP + shown.len() * LINE + 48;
    let title = escape(title);
    let report = &run.report;
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="system-ui, sans-serif" font-size="12"><title>{title}</title>"#
    )?;
    style(svg)?;
    writeln!(svg, r#"<rect class="ground" width="{WIDTH}" height="{height}"/>"#)?;
    writeln!(svg, r#"<text class="title" x="16" y="28">{title}</text>"#)?;
    writeln!(
        svg,
        r#"<text class="quiet" x="16" y="46">{}: {} requests, {:.1} % of them hits, {} loads in {:.0} s, {} evictions, waits {:.2} s p50, {:.2} s p99</text>"#,
        report.policy,
        report.requests,
        report.hit_rate * 100.0,
        report.loads,
        report.load_seconds,
        report.evictions,
        report.waits.p50_seconds,
        report.waits.p99_seconds
    )?;
    for (number, device) in machine.devices.iter().enumerate() {
        let (x, color) = (16 + number * 120, number % COLORS.len());
        writeln!(svg, r#"<rect class="d{color}" x="{x}" y="58" width="10" height="10"/>"#)?;
        writeln!(svg, r#"<text class="quiet" x="{}" y="67">{}</text>"#, x + 16, device.device_id)?;
    }
    for (line, at) in shown.iter().enumerate() {
        let y = TOP + line * LINE;
        let name = escape(machine.models[*at].name.as_str());
        writeln!(svg, r#"<text x="{}" y="{}" text-anchor="end">{name}</text>"#, LEFT - 8, y + 12)?;
        writeln!(svg, r#"<rect class="plot" x="{LEFT}" y="{y}" width="{COLUMNS}" height="{}"/>"#, LINE - 3)?;
        let mut from = 0;
        for run in columns[*at].chunk_by(|one, next| one == next) {
            if let Some(device) = run[0] {
                let (x, width, color) = (LEFT + from, run.len(), device % COLORS.len());
                writeln!(
                    svg,
                    r#"<rect class="d{color}" x="{x}" y="{y}" width="{width}" height="{}"/>"#,
                    LINE - 3
                )?;
            }
            from += run.len();
        }
    }
    let y = TOP + shown.len() * LINE + 16;
    for part in 0..=4 {
        let x = LEFT + COLUMNS * part / 4;
        let time = end * part as f64 / 4.0;
        writeln!(svg, r#"<text class="quiet" x="{x}" y="{y}" text-anchor="middle">{time:.0} s</text>"#)?;
    }
    if left_out > 0 {
        writeln!(svg, r#"<text class="quiet" x="16" y="{}">and {left_out} more models</text>"#, y + 20)?;
    }
    writeln!(svg, "</svg>")
}

fn style(svg: &mut String) -> std::fmt::Result {
    svg.push_str(
        "<style>.ground{fill:#fff}.plot{fill:#f0f2f5}text{fill:#1f2328}.quiet{fill:#59626d}.title{font-size:17px;font-weight:600}",
    );
    for (number, (light, _)) in COLORS.iter().enumerate() {
        write!(svg, ".d{number}{{fill:{light}}}")?;
    }
    svg.push_str(
        "@media(prefers-color-scheme:dark){.ground{fill:#14171c}.plot{fill:#1b1f26}text{fill:#e6e9ee}.quiet{fill:#a0a8b4}",
    );
    for (number, (_, dark)) in COLORS.iter().enumerate() {
        write!(svg, ".d{number}{{fill:{dark}}}")?;
    }
    svg.push_str("}</style>\n");
    Ok(())
}
