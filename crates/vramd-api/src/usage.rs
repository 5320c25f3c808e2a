//! Use over time: the bodies of `/api/memory/usage`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::DeviceId;

/// How far back samples are kept: an hour, one a second.
pub const USAGE_SECONDS: u64 = 3600;
/// The most steps in one answer.
pub const MAX_USAGE_POINTS: u64 = 3600;

/// `GET /api/memory/usage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsagePage {
    pub devices: Vec<DeviceUsage>,
}

/// One device over a window of time. What was not sampled is absent, never 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceUsage {
    pub device_id: DeviceId,
    pub window_seconds: u64,
    pub step_seconds: u64,
    /// The seconds of the window that were sampled: fewer after a start, or when the machine slept.
    pub sampled_seconds: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<UsagePeak>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<UsageAverage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates: Option<UsageRates>,
    /// The 16 largest, and `(others)`; looked at every ten seconds.
    pub by_owner: Vec<UsageShare>,
    /// The same by purpose.
    pub by_purpose: Vec<UsageShare>,
    /// Oldest first; a step in which nothing was sampled is left out.
    pub samples: Vec<UsageSample>,
}

/// The most at any moment, between samples too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsagePeak {
    pub used_bytes: u64,
    pub allocated_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageAverage {
    pub used_bytes: u64,
    pub allocated_bytes: u64,
    pub available_bytes: u64,
    /// 0 to 1.
    pub utilization: f64,
    /// 0 to 1.
    pub fragmentation: f64,
}

/// Over the sampled seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageRates {
    pub allocations_per_second: f64,
    pub releases_per_second: f64,
    pub allocated_bytes_per_second: f64,
    pub released_bytes_per_second: f64,
    /// Requests for memory that were refused for the lack of it.
    pub refusals_per_second: f64,
}

/// What one owner, or one purpose, held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageShare {
    pub name: String,
    /// When it was last looked at.
    pub bytes: u64,
    pub peak_bytes: u64,
    pub average_bytes: u64,
}

/// One step: averages of levels, the highest of peaks, sums of counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageSample {
    /// When the step begins.
    pub at: Timestamp,
    pub used_bytes: u64,
    pub allocated_bytes: u64,
    pub pool_free_bytes: u64,
    pub reserved_bytes: u64,
    pub foreign_bytes: u64,
    pub available_bytes: u64,
    pub peak_used_bytes: u64,
    pub peak_allocated_bytes: u64,
    /// 0 to 1.
    pub fragmentation: f64,
    pub allocations: u64,
    pub releases: u64,
    pub refusals: u64,
}
