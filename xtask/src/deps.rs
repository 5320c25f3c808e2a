//! Which of our crates may use which; the table of DESIGN as a test.

use anyhow::{Result, bail};

use crate::process::metadata;

/// A crate and those of ours that it may use, in any way, tests included.
const ALLOWED: &[(&str, &[&str])] = &[
    ("vramd-api", &[]),
    ("vramd-core", &["vramd-api"]),
    // Its tests are clients of what it exports.
    ("vramd-device", &["vramd-api", "vramd-attach", "vramd-fake-cuda", "vramd-windows"]),
    ("vramd-fake-cuda", &[]),
    ("vramd-attach", &["vramd-api", "vramd-windows"]),
    (
        "vramd-daemon",
        &["vramd-api", "vramd-attach", "vramd-core", "vramd-device", "vramd-fake-cuda", "vramd-windows"],
    ),
    ("vramd", &["vramd-api", "vramd-attach", "vramd-core", "vramd-daemon", "vramd-windows"]),
    ("vramd-windows", &[]),
    ("xtask", &[]),
];

pub fn run() -> Result<()> {
    let mut faults = Vec::new();
    for member in metadata()?["packages"].as_array().into_iter().flatten() {
        let name = member["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            faults
                .push(format!("{name} is not in the table of xtask/src/deps.rs: say there what it may use"));
            continue;
        };
        let ours =
            member["dependencies"].as_array().into_iter().flatten().filter(|one| one["source"].is_null());
        for dependency in ours.filter_map(|one| one["name"].as_str()) {
            if dependency != name && !allowed.contains(&dependency) {
                faults.push(format!("{name} may not use {dependency}"));
            }
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    bail!(
        "{}\nhint: what both need belongs into vramd-api; what joins them, into vramd-daemon",
        faults.join("\n")
    )
}
