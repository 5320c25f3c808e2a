//! Attachments of a daemon that the tests play.

mod daemon;
mod moves;
