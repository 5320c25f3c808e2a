//! `vramd simulate`: a trace of requests on a machine that need not be there, with no daemon.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vramd_api::{Bytes, EvictionPolicy};
use vramd_core::simulation::{self, Machine, Report, SimulationError};

use crate::arguments::{EVICTION_POLICIES, SimulateArguments};
use crate::error::CommandError;
use crate::output::{Output, percent, table};

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Reports {
    policies: Vec<Report>,
}

pub fn simulate(arguments: &SimulateArguments, output: Output) -> Result<(), CommandError> {
    let path = &arguments.machine;
    let text = std::fs::read_to_string(path)
        .map_err(|error| usage(format!("{} could not be read: {error}", path.display()), MACHINE))?;
    let machine = Machine::read(&text).map_err(|error| unfit(path, &error))?;
    let path = &arguments.trace;
    let file = File::open(path).map_err(|error| {
        usage(
            format!("{} could not be opened: {error}", path.display()),
            "give a file of lines `time,model,seconds`",
        )
    })?;
    let trace =
        machine.trace(BufReader::with_capacity(1 << 20, file)).map_err(|error| unfit(path, &error))?;
    let all = || EVICTION_POLICIES.iter().map(|(_, policy)| *policy).collect();
    let policies: Vec<EvictionPolicy> = arguments.policy.map_or_else(all, |policy| vec![policy]);
    let mut reports = Vec::new();
    for policy in policies {
        let run = simulation::run(&machine, &trace, policy);
        if let Some(path) = arguments.svg.as_ref().filter(|_| reports.is_empty()) {
            picture(path, &machine, &run, &arguments.trace)?;
            output.say(&format!("the picture of {policy} is in {}", path.display()));
        }
        reports.push(run.report);
    }
    output.data(&Reports { policies: reports }, |reports| show(&reports.policies))
}

fn picture(
    path: &PathBuf,
    machine: &Machine,
    run: &simulation::Run,
    trace: &Path,
) -> Result<(), CommandError> {
    let title = trace.file_name().unwrap_or_default().to_string_lossy();
    std::fs::write(path, simulation::draw(machine, run, &title)).map_err(|error| {
        usage(format!("{} could not be written: {error}", path.display()), "choose another file")
    })
}

const MACHINE: &str = "a machine is JSON: {\"devices\": [{\"deviceId\": \"cuda:0\", \"bytes\": \"24GiB\"}], \"models\": [{\"name\": \"a\", \"bytes\": \"13GiB\"}]}";

fn unfit(path: &Path, error: &SimulationError) -> CommandError {
    let hint = match error {
        SimulationError::Machine(_) => MACHINE,
        SimulationError::Line { .. } | SimulationError::Empty => {
            "each line is `time,model,seconds`: seconds since the beginning, a model of the machine, how long it is used"
        }
        SimulationError::Read(_) => "is it a text file that you may read?",
    };
    usage(format!("{}: {error}", path.display()), hint)
}

fn usage(message: String, hint: &str) -> CommandError {
    CommandError::Usage { message, hint: hint.to_owned() }
}

fn show(reports: &[Report]) -> String {
    table(
        [
            "POLICY",
            ">HITS",
            ">LOADS",
            ">FROM RAM",
            ">LOADED",
            ">LOAD SECONDS",
            ">EVICTIONS",
            ">WAIT P50",
            ">P99",
            ">MOST",
        ],
        reports.iter().map(|report| {
            let waits = &report.waits;
            let seconds = |seconds: f64| format!("{seconds:.2} s");
            [
                report.policy.to_string(),
                percent(report.hit_rate),
                report.loads.to_string(),
                report.from_ram.to_string(),
                Bytes::show(report.loaded_bytes),
                format!("{:.0}", report.load_seconds),
                report.evictions.to_string(),
                seconds(waits.p50_seconds),
                seconds(waits.p99_seconds),
                seconds(waits.max_seconds),
            ]
        }),
    )
}
