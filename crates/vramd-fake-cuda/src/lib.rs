//! A driver of NVIDIA's for machines without a card: the functions of `libcuda.so.1` and `libnvidia-ml.so.1` that vramd calls.
//!
//! A card's memory is a memory file, so descriptors pass between real processes; what is created has old bytes in it. Calls that need a
//! context fail on threads that have none. The library looks at files beside itself, which a test writes: `cards`, what there is
//! (a line each: uuid, bytes, and what others have); `faults`, which calls fail (a line each: a function, the how many-th call from
//! now on, 0 for every one, and the code that it answers; with `nothing` behind a function's name it succeeds with nothing to show); `hang`, whose being there lets no copy end; `processes`, who uses the first card; and `xid.N`, a fault that card N reports once. It writes
//! `contexts`, the processes that have opened one, and `uses`, what each has. Each copy of the library in a directory of its own is
//! a driver of its own.
#![allow(non_snake_case)]

mod cuda;
mod installed;
mod nvml;
mod state;

pub use installed::{Installed, loader_arguments};
