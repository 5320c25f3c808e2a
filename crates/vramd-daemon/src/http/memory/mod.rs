//! `/api/memory`.

pub mod allocations;
pub mod limits;
pub mod status;
