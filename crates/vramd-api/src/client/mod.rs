//! Typed clients.
