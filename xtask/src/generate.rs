//! The references that the binary writes about itself, kept in the repository so that a change shows in review.

use anyhow::{Context, Result, bail};

use crate::process::{cargo, output, root};

/// What `vramd generate` is asked for, and the file that holds it.
const REFERENCES: &[(&str, &str)] = &[
    ("openapi", "openapi/vramd.json"),
    ("cli", "docs/cli.md"),
    ("config", "docs/config.md"),
    ("errors", "docs/errors.md"),
];

pub fn write() -> Result<()> {
    for (what, file) in REFERENCES {
        let path = root().join(file);
        let text = generated(what)?;
        if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        std::fs::write(&path, text).with_context(|| format!("could not write {file}"))?;
        eprintln!("wrote {file}");
    }
    Ok(())
}

pub fn check() -> Result<()> {
    let mut faults = Vec::new();
    for (what, file) in REFERENCES {
        let committed = std::fs::read_to_string(root().join(file)).unwrap_or_default();
        if let Some(difference) = first_difference(&committed, &generated(what)?) {
            faults.push(format!("{file} is not what the code says now\n{difference}"));
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    bail!("{}\nhint: run `make gen` and commit what changed", faults.join("\n"))
}

fn generated(what: &str) -> Result<String> {
    output(cargo().args(["run", "--quiet", "--package", "vramd", "--locked", "--", "generate", what]))
}

fn first_difference(committed: &str, generated: &str) -> Option<String> {
    if committed == generated {
        return None;
    }
    let (mut old, mut new) = (committed.split('\n'), generated.split('\n'));
    for number in 1.. {
        let (was, is) = (old.next(), new.next());
        if was != is {
            let show = |line: Option<&str>| line.unwrap_or("(the end)").chars().take(120).collect::<String>();
            return Some(format!("  line {number}\n  - {}\n  + {}", show(was), show(is)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_shown() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n").as_deref(), Some("  line 2\n  - b\n  + c"));
        assert_eq!(first_difference("a", "a\n").as_deref(), Some("  line 2\n  - (the end)\n  + "));
    }
}
