//! `vramd doctor`: what works on this machine, and why the rest does not.
//!
//! Asks the machine ([`machine`]), the places that the settings name ([`places`]) and the daemon itself. It
//! changes nothing. A warning costs speed or comfort; a fault keeps the daemon from serving.

mod machine;
mod places;

use std::process::ExitCode;

use serde::Serialize;
use vramd_api::client::{Client, ClientError};
use vramd_api::{Bytes, DeviceHealth};

use super::config;
use crate::arguments::ServeArguments;
use crate::error::{CommandError, FAULT};
use crate::output::{Output, Tone};

/// The exit code when nothing is worse than a warning.
const WARNED: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
enum Verdict {
    Ok,
    Warning,
    Fault,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, message: message.into(), hint: None }
    }

    fn warning(name: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warning, message: message.into(), hint: Some(hint.into()) }
    }

    fn fault(name: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fault, message: message.into(), hint: Some(hint.into()) }
    }
}

pub async fn doctor(
    server: &str,
    arguments: ServeArguments,
    output: Output,
) -> Result<ExitCode, CommandError> {
    let mut checks = machine::checks();
    let answers = daemon(server, &mut checks).await;
    match config::resolved(arguments) {
        Ok(settings) => checks.extend(places::checks(settings, answers)?),
        Err(error) => {
            let hint = error.hint();
            checks.push(Check::fault("settings", CommandError::from(error).message(), hint));
        }
    }
    let worst = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok);
    output.data(&serde_json::json!({ "verdict": worst, "checks": &checks }), |_| report(&checks, output))?;
    Ok(match worst {
        Verdict::Ok => ExitCode::SUCCESS,
        Verdict::Warning => WARNED.into(),
        Verdict::Fault => FAULT.into(),
    })
}

/// Asks the daemon; whether one answers.
async fn daemon(server: &str, checks: &mut Vec<Check>) -> bool {
    match ask(server, checks).await {
        Ok(()) => true,
        Err(error @ ClientError::Connect { .. }) => {
            checks.push(Check::warning("daemon", error.to_string(), error.hint().unwrap_or_default()));
            false
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            checks.push(Check::fault("daemon", error.to_string(), hint));
            true
        }
    }
}

async fn ask(server: &str, checks: &mut Vec<Check>) -> Result<(), ClientError> {
    let client = Client::new(server)?;
    let health = client.health().await?;
    checks.push(if health.version == vramd_api::VERSION {
        Check::ok("daemon", format!("version {} answers at {server}", health.version))
    } else {
        Check::warning(
            "daemon",
            format!("version {} answers at {server}, and this is {}", health.version, vramd_api::VERSION),
            "restart the daemon to run the same version",
        )
    });
    client.ready().await?;
    for device in client.devices().await?.devices {
        let line = format!("{} has {} ({})", device.device_id, Bytes::show(device.total_bytes), device.name);
        checks.push(match (device.health, device.notes.is_empty()) {
            (DeviceHealth::Lost, _) => {
                Check::fault("device", format!("{} is lost", device.device_id), device.notes.join("; "))
            }
            (DeviceHealth::Healthy, true) => Check::ok("device", line),
            (DeviceHealth::Healthy, false) => Check::warning("device", line, device.notes.join("; ")),
        });
    }
    Ok(())
}

fn report(checks: &[Check], output: Output) -> String {
    let mut lines = Vec::new();
    for check in checks {
        let (word, tone) = match check.verdict {
            Verdict::Ok => ("ok     ", Tone::Good),
            Verdict::Warning => ("warning", Tone::Note),
            Verdict::Fault => ("fault  ", Tone::Bad),
        };
        lines.push(format!("{}  {:<13}  {}", output.tone(word, tone), check.name, check.message));
        lines.extend(check.hint.as_ref().map(|hint| format!("{:24}{hint}", "")));
    }
    lines.join("\n")
}
