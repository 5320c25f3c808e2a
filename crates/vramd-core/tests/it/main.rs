//! The core against dull models and bad input.

#![allow(clippy::unwrap_used, reason = "what a test unwraps, it asserts")]

mod compaction;
mod gguf;
mod layout;
mod ledger;
mod queue;
mod ranges;
mod replay;
mod simulation;
