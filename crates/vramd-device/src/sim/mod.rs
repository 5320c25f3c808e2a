//! Simulated devices of any size and speed, with faults on demand.
//!
//! Owns the model of a device that the daemon cannot touch: capacity to the byte, one link of a given speed,
//! staged copies, and everything that can go wrong ([`Faults`]). The contents are real, in host memory that is
//! only taken for what was written. It leaves out what a simulated device computes: nothing.

mod device;
mod faults;
mod link;
mod spec;

pub use device::{Device, OpenError};
pub use faults::{Fault, Faults, Held};
pub use spec::{BadSpec, Spec, parse_spec};
