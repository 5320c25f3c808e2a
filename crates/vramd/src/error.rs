//! Everything that ends a command, and the exit code and hint that go with it.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use vramd_api::client::ClientError;
use vramd_api::{ApiError, ErrorCode};
use vramd_attach::AttachError;

use crate::settings::SettingsError;

/// The daemon refused.
pub const REFUSED: u8 = 1;
/// The command was used wrongly, or something is broken.
pub const FAULT: u8 = 2;

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// An operation ended in an error.
    #[error("{0}")]
    Operation(Box<ApiError>),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Start(#[from] vramd_daemon::StartError),
    #[error("{message}")]
    Usage { message: String, hint: String },
    #[error("{0}")]
    Fault(String),
    #[error("the output could not be written")]
    Output(#[from] io::Error),
}

impl CommandError {
    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Client(error) => error.hint(),
            Self::Attach(error) => error.hint(),
            Self::Operation(error) => error.hint.clone(),
            Self::Settings(error) => Some(error.hint()),
            Self::Start(error) => error.hint(),
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::Fault(_) | Self::Output(_) => None,
        }
    }

    /// The daemon's own error, if it is one.
    pub fn api(&self) -> Option<&ApiError> {
        match self {
            Self::Client(error) => error.api(),
            Self::Attach(AttachError::Api(error)) | Self::Operation(error) => Some(error),
            _ => None,
        }
    }

    /// What happened, with the innermost cause: what lies between says nothing more.
    pub fn message(&self) -> String {
        let mut root: Option<&dyn Error> = self.source();
        while let Some(deeper) = root.and_then(Error::source) {
            root = Some(deeper);
        }
        match root {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }

    pub fn exit_code(&self) -> ExitCode {
        match self.api().map(|error| error.code) {
            Some(
                ErrorCode::Internal
                | ErrorCode::ModelReadFailed
                | ErrorCode::DeviceLost
                | ErrorCode::StoreFailed
                | ErrorCode::Unavailable,
            )
            | None => FAULT.into(),
            Some(_) => REFUSED.into(),
        }
    }

    /// Whether the reader of our output has gone, as `head` does.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
