//! Anything that takes time.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ApiError, OperationId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum OperationKind {
    Load,
    Unload,
    Transfer,
    Copy,
    Defragment,
    Clear,
    /// Models go because memory is tight, or because somebody asked for that.
    Optimize,
}

/// `Queued → Running → Completed | Failed | Cancelled`; a queued operation can be cancelled too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum OperationState {
    Queued,
    Running,
    Completed,
    Failed,
    Cancelled,
}

impl OperationState {
    pub const fn ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    pub operation_id: OperationId,
    pub kind: OperationKind,
    /// What it works on, in words: `minilm on cpu:0`.
    pub subject: String,
    pub state: OperationState,
    /// It begins nothing new until it is resumed.
    #[serde(default)]
    pub paused: bool,
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// Over its whole time so far; absent before the first bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<f64>,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
    /// What it brought, once completed; the keys depend on the kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OperationPage {
    pub operations: Vec<Operation>,
}
