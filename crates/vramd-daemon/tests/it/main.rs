//! The daemon in this process, over real sockets, on simulated devices that fail when told to.

mod allocations;
mod attach;
#[cfg(unix)]
mod bridges;
mod clear;
mod death;
mod events;
mod faults;
mod files;
mod gguf;
mod idempotency;
mod late;
mod limits;
mod meetings;
mod models;
mod moves;
mod pairs;
mod parts;
mod plan;
mod quiet_hours;
mod ram;
#[cfg(unix)]
mod relief;
mod reservations;
mod restart;
mod split;
mod support;
mod tiers;
#[cfg(unix)]
mod unix;
mod usage;
mod wire;
#[cfg(unix)]
mod workers;
