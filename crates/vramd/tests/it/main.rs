//! The real binary, run as a person runs it: exit codes, what is printed where, settings, and the daemon.

mod config;
mod daemon;
mod durability;
mod offline;
mod replay;
mod support;
