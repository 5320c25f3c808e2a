//! The house rules that no compiler or formatter knows.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::process::{files, metadata, root};

/// The longest source file, tests not counted.
const MOST_LINES: usize = 800;
/// The crates whose lints may allow unsafe code: what maps memory, on either side, and what calls foreign interfaces.
const UNSAFE_CRATES: [&str; 4] =
    ["crates/vramd-device", "crates/vramd-attach", "crates/vramd-fake-cuda", "crates/vramd-windows"];
/// Where each library that we use has its line of reason.
const REASONS: &str = "docs/dependencies.md";

/// What no Rust file may contain, each with its reason; written in pieces, so that this file may hold them.
const FORBIDDEN: &[(&str, &str)] = &[
    (concat!("todo", "!("), "finish it or leave it out"),
    (concat!("unimplemented", "!("), "finish it or leave it out"),
    (concat!("dbg", "!("), "use tracing"),
    (concat!("#[", "ignore"), "a test that never runs proves nothing"),
];

pub fn run() -> Result<()> {
    let mut faults = Vec::new();
    for file in files()? {
        let bytes = std::fs::read(root().join(&file))
            .with_context(|| format!("could not read {}", file.display()))?;
        if let Ok(text) = String::from_utf8(bytes) {
            faults.extend(
                faults_of(&file, &text).into_iter().map(|fault| format!("{}{fault}", file.display())),
            );
        }
    }
    faults.extend(faults_of_dependencies()?);
    if faults.is_empty() {
        return Ok(());
    }
    bail!("{}", faults.join("\n"))
}

/// Faults of one text file; each begins with `:line` or `:`.
fn faults_of(file: &Path, text: &str) -> Vec<String> {
    let is = |extension: &str| file.extension().is_some_and(|found| found == extension);
    // Frames are compared to the byte and fuzz seeds are data: no rule for texts holds there.
    if file.starts_with("protocol/golden") || file.starts_with("fuzz/seeds") {
        return Vec::new();
    }
    let mut faults = Vec::new();
    if !text.is_empty() && !text.ends_with('\n') {
        faults.push(": the last line has no end".to_owned());
    }
    for (number, line) in (1..).zip(text.lines()) {
        if line.ends_with([' ', '\t', '\r']) {
            faults.push(format!(":{number}: blanks at the end of the line"));
        }
        if own_places().iter().any(|place| line.contains(place.as_str())) {
            faults.push(format!(":{number}: a path of this machine"));
        }
    }
    if is("rs") {
        faults.extend(faults_of_rust(file, text));
    }
    if is("rs") || is("py") {
        let lines = lines_without_tests(file, text);
        if lines > MOST_LINES {
            faults.push(format!(": {lines} lines; at most {MOST_LINES}, so split it by what it owns"));
        }
    }
    faults
}

fn faults_of_rust(file: &Path, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let in_src = file.components().any(|part| part.as_os_str() == "src");
    if in_src && !text.starts_with("//!") {
        faults.push(": begins without a //! line that says what it owns".to_owned());
    }
    for (number, line) in (1..).zip(text.lines()) {
        for (word, reason) in FORBIDDEN {
            if line.contains(word) {
                faults.push(format!(":{number}: {word} is not kept: {reason}"));
            }
        }
        if line.contains(concat!("allow(", "unsafe_code)")) && !may_be_unsafe(file) {
            faults.push(format!(":{number}: unsafe code belongs into {}", UNSAFE_CRATES[..2].join(" or ")));
        }
    }
    faults
}

fn may_be_unsafe(file: &Path) -> bool {
    UNSAFE_CRATES.iter().any(|allowed| file.starts_with(allowed))
}

/// The lines of a source file up to its unit tests; 0 for a file of tests.
fn lines_without_tests(file: &Path, text: &str) -> usize {
    if file.components().any(|part| part.as_os_str() == "tests") {
        return 0;
    }
    text.lines().take_while(|line| *line != "#[cfg(test)]").count()
}

/// Directories whose names say where this was written: this checkout and the home directory.
fn own_places() -> Vec<String> {
    let home = std::env::var("HOME").unwrap_or_default();
    [root().display().to_string(), home]
        .into_iter()
        .filter(|place| place.len() > 1)
        .map(|place| format!("{}/", place.trim_end_matches('/')))
        .collect()
}

/// Every member takes the workspace's lints, and every library has its reason, and no reason is left over.
fn faults_of_dependencies() -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut used = BTreeSet::new();
    for member in metadata()?["packages"].as_array().into_iter().flatten() {
        let manifest = member["manifest_path"].as_str().unwrap_or_default().to_owned();
        let text =
            std::fs::read_to_string(&manifest).with_context(|| format!("could not read {manifest}"))?;
        let shown = Path::new(&manifest).strip_prefix(root()).unwrap_or(Path::new(&manifest));
        if !text.contains("[lints]\nworkspace = true") && !may_be_unsafe(shown) {
            faults.push(format!("{}: does not take the lints of the workspace", shown.display()));
        }
        let libraries = member["dependencies"].as_array().into_iter().flatten();
        used.extend(
            libraries
                .filter(|library| !library["source"].is_null())
                .filter_map(|library| library["name"].as_str().map(str::to_owned)),
        );
    }
    let text =
        std::fs::read_to_string(root().join(REASONS)).with_context(|| format!("could not read {REASONS}"))?;
    let reasons = reasons(&text);
    faults.extend(used.difference(&reasons).map(|name| format!("{REASONS}: says nothing about `{name}`")));
    faults.extend(reasons.difference(&used).map(|name| format!("{REASONS}: nothing uses `{name}`")));
    Ok(faults)
}

/// The names in the first column of the table under `## Rust`.
fn reasons(text: &str) -> BTreeSet<String> {
    text.lines()
        .skip_while(|line| *line != "## Rust")
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("| ")?.split('|').next())
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(file: &str, text: &str) -> usize {
        faults_of(Path::new(file), text).len()
    }

    #[test]
    fn a_sound_file_has_no_fault() {
        assert_eq!(faults("crates/a/src/lib.rs", "//! What it owns.\n\nfn f() {}\n"), 0);
        assert_eq!(faults("crates/a/tests/it/b.rs", "fn f() {}\n"), 0);
    }

    #[test]
    fn each_rule_finds_its_fault() {
        assert_eq!(faults("a/src/lib.rs", "fn f() {}\n"), 1, "no module doc");
        assert_eq!(faults("README.md", "text"), 1, "no line end");
        assert_eq!(faults("README.md", "text \n"), 1, "blanks");
        assert_eq!(faults("README.md", &format!("see {}/Cargo.toml\n", root().display())), 1, "a path");
        for (word, _) in FORBIDDEN {
            assert_eq!(faults("a/tests/it/b.rs", &format!("{word}\n")), 1, "{word}");
        }
        let unsafe_code = concat!("#![allow(", "unsafe_code)]\n");
        assert_eq!(faults("crates/vramd-core/tests/it/a.rs", unsafe_code), 1);
        assert_eq!(faults("crates/vramd-device/tests/it/a.rs", unsafe_code), 0);
    }

    #[test]
    fn long_files_are_found_and_their_tests_not_counted() {
        let long = "//! Doc.\n".repeat(MOST_LINES + 1);
        assert_eq!(faults("a/src/lib.rs", &long), 1);
        assert_eq!(faults("a/tests/it/b.rs", &long), 0);
        assert_eq!(faults("a/src/lib.rs", &format!("//! Doc.\n#[cfg(test)]\n{long}")), 0);
    }

    #[test]
    fn reasons_are_read_from_the_table() {
        let text =
            "## Rust\n\n| crate | reason |\n|---|---|\n| `a`, `b` | with `c` |\n\n## Python\n| `d` | |\n";
        assert_eq!(reasons(text).into_iter().collect::<Vec<_>>(), ["a", "b"]);
    }
}
