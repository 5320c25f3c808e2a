//! Attachments of a daemon that the tests play, over a Unix socket. The pipe of Windows is tried against the real one only.
#![cfg(unix)]

mod daemon;
mod moves;
