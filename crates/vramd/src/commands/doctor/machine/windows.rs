//! Memory, and what the system would still promise of it.

use vramd_api::Bytes;
use vramd_windows::Memory;

use super::{Check, LEAST_MEMORY};

pub fn checks() -> Vec<Check> {
    let figures = match vramd_windows::memory() {
        Ok(figures) => figures,
        Err(error) => {
            return vec![Check::fault(
                "memory",
                format!("the system does not tell of memory: {error}"),
                "see its event log",
            )];
        }
    };
    vec![super::memory(figures.available_bytes, figures.total_bytes), commitment(&figures)]
}

/// Segments are committed when they are made: the system promises them memory, of RAM or of the page file.
fn commitment(figures: &Memory) -> Check {
    const NAME: &str = "commitment";
    let message = format!("the system would still promise {}", Bytes::show(figures.promisable_bytes));
    if figures.promisable_bytes >= figures.available_bytes.max(LEAST_MEMORY) {
        return Check::ok(NAME, message);
    }
    Check::warning(
        NAME,
        format!("{message}, less than is free"),
        "let the page file grow (System, Advanced, Performance), or close programs that reserve much",
    )
}
