//! The serving end of a named pipe.

use std::io;
use std::path::Path;

use tokio::net::windows::named_pipe::{NamedPipeServer, ServerOptions};

use crate::security::Security;

/// Makes an end that a client can come to, for this process's user, the system and administrators alone. With `first`, it is
/// an error if there is one already.
pub fn serve(path: &Path, first: bool) -> io::Result<NamedPipeServer> {
    let security = Security::own_user()?;
    let mut attributes = security.attributes();
    let mut options = ServerOptions::new();
    options.first_pipe_instance(first).reject_remote_clients(true);
    // SAFETY: a structure of the kind that is asked for, and what it points to lives until the call returns.
    unsafe { options.create_with_security_attributes_raw(path, (&raw mut attributes).cast()) }
}
