//! `vramd replay`: a trace in a pool, with no daemon.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use vramd_api::Bytes;
use vramd_core::replay::{self, DeviceTrace, Format, Irregularities, Options, Report, Trace, TraceError};

use crate::arguments::ReplayArguments;
use crate::error::CommandError;
use crate::output::{Output, list};

pub fn replay(arguments: &ReplayArguments, output: Output) -> Result<(), CommandError> {
    let trace = read(&arguments.file, arguments.format)?;
    if trace.torn {
        output.say("the last line was cut off and is left out");
    }
    let device = choose(&trace, arguments.device.as_deref(), &arguments.file)?;
    let options = Options { pool_bytes: arguments.pool.map(Bytes::get), alignment: arguments.alignment };
    let replayed = replay::replay(device, options)
        .map_err(|error| usage(error.to_string(), "give a size of the pool with `--pool`"))?;
    if let Some(path) = &arguments.svg {
        let name = arguments.file.file_name().unwrap_or_default().to_string_lossy();
        let title = format!("{name}, {}", device.name);
        std::fs::write(path, replay::picture::draw(device, &replayed, &title)).map_err(|error| {
            usage(format!("{} could not be written: {error}", path.display()), "choose another file")
        })?;
        output.say(&format!("the picture is in {}", path.display()));
    }
    output.data(&replayed.report, show)
}

fn read(path: &Path, format: Option<Format>) -> Result<Trace, CommandError> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| {
        usage(format!("{shown} could not be opened: {error}"), "`vramd record --out FILE` writes a trace")
    })?;
    replay::read(&mut BufReader::with_capacity(1 << 20, file), format).map_err(|error| {
        let hint = match &error {
            TraceError::Empty => "`vramd record --out FILE` writes a trace",
            TraceError::Unknown => "if it is one nevertheless, say which with `--format`",
            TraceError::Line { line: 1, .. } => {
                "does it begin elsewhere in the file, or is it another format?"
            }
            TraceError::Line { .. } => {
                "what is before that line can be replayed if it and the rest are removed"
            }
            TraceError::Byte { .. } => "write it with `torch.cuda.memory._dump_snapshot`, and copy it whole",
            TraceError::Content(_) => {
                "`torch.cuda.memory._record_memory_history()` before the work makes PyTorch keep a history"
            }
            TraceError::Read(_) => "is it a file that you may read?",
        };
        let cause = match &error {
            TraceError::Read(cause) => format!(": {cause}"),
            _ => String::new(),
        };
        usage(format!("{shown}: {error}{cause}"), hint)
    })
}

fn choose<'a>(trace: &'a Trace, wanted: Option<&str>, path: &Path) -> Result<&'a DeviceTrace, CommandError> {
    let devices: Vec<&DeviceTrace> =
        trace.devices.iter().filter(|device| !device.events.is_empty()).collect();
    let names = devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
    let shown = path.display();
    match (wanted, &devices[..]) {
        (_, []) => Err(usage(
            format!("{shown} holds no allocations"),
            match trace.format {
                Format::Vramd => "record while something is allocated",
                Format::Rmm => "log while something is allocated",
                Format::Pytorch => {
                    "call `torch.cuda.memory._record_memory_history()` before the work that it should show"
                }
            },
        )),
        (None, [device]) => Ok(device),
        (None, _) => Err(usage(
            format!("{shown} has several devices: {names}"),
            "choose one with `--device`: each has a pool of its own",
        )),
        (Some(wanted), devices) => devices
            .iter()
            .find(|device| device.name == wanted)
            .copied()
            .ok_or_else(|| usage(format!("{shown} has no device {wanted:?}"), &format!("it has {names}"))),
    }
}

fn usage(message: String, hint: &str) -> CommandError {
    CommandError::Usage { message, hint: hint.to_owned() }
}

fn show(report: &Report) -> String {
    let pool = Bytes::show(report.pool_bytes);
    let live = Bytes::show(report.peak_live_bytes);
    let overhead = format!("{:.1} %", report.overhead * 100.0);
    let verdict = if report.smallest_pool {
        format!("{} needs at least {pool}; live peak {live}, so {overhead} overhead", report.device)
    } else {
        match report.refusals.count {
            0 => format!("{} fits into {pool}; live peak {live}", report.device),
            count => format!("{}: {count} refused in {pool}; live peak {live}", report.device),
        }
    };
    let fragmentation = &report.fragmentation;
    let mut rows = vec![
        ("events", report.events.to_string()),
        ("allocations", format!("{}, {} live at the end", report.allocations, report.live_at_end)),
        ("span", format!("{:.3} s", report.milliseconds / 1000.0)),
        ("alignment", Bytes::show(report.alignment)),
        ("highest address", Bytes::show(report.peak_address_bytes)),
        (
            "fragmentation",
            format!("{:.1} % mean, {:.1} % peak", fragmentation.mean * 100.0, fragmentation.peak * 100.0),
        ),
    ];
    if let Some(lifetimes) = &report.lifetimes {
        let (median, p99) = (lifetimes.median_milliseconds, lifetimes.p99_milliseconds);
        rows.push(("lifetimes", format!("{median:.3} ms median, {p99:.3} ms p99")));
    }
    let refusals = &report.refusals;
    rows.push((
        "refused",
        format!("{}, {} of them for fragmentation alone", refusals.count, refusals.by_fragmentation),
    ));
    if let Some(first) = refusals.first.first() {
        rows.push((
            "first refusal",
            format!(
                "event {}, {}: {} were free, {} in one piece",
                first.event,
                Bytes::show(first.bytes),
                Bytes::show(first.free_bytes),
                Bytes::show(first.largest_free_bytes)
            ),
        ));
    }
    if report.traced_failures > 0 {
        rows.push(("failed when traced", report.traced_failures.to_string()));
    }
    let Irregularities { double_frees, unknown_frees, overlapping_allocations, gaps, missed_events } =
        report.irregularities;
    for (name, count) in [
        ("double frees", double_frees),
        ("frees of unknown", unknown_frees),
        ("overlaps", overlapping_allocations),
        ("gaps", gaps),
        ("missed events", missed_events),
    ] {
        if count > 0 {
            rows.push((name, count.to_string()));
        }
    }
    format!("{verdict}\n\n{}", list(&rows))
}
