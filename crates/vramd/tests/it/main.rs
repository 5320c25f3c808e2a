//! The real binary, run as a person runs it: exit codes, what is printed where, settings, and the daemon.

#[cfg(unix)]
mod config;
mod daemon;
mod durability;
#[cfg(unix)]
mod offline;
mod replay;
mod support;
