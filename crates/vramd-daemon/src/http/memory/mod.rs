//! `/api/memory`.

pub mod allocations;
pub mod clear;
pub mod defragment;
pub mod limits;
pub mod plan;
pub mod pressure;
pub mod reservations;
pub mod status;
pub mod transfers;
pub mod usage;
