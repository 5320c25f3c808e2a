//! Memory: admitted, listed, renewed, released; leases, waiting requests, limits, and figures that add up.

use std::time::{Duration, Instant};

use proptest::test_runner::{RngAlgorithm, TestRng};
use rand_core as _;
use serde_json::{Value, json};

use crate::support::{Daemon, MIB, wait_for};
