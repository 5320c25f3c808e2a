//! A Unix socket; descriptors travel beside the bytes.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

pub use std::os::fd::OwnedFd as Descriptor;
pub use std::os::unix::net::UnixStream as Stream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vramd_api::attach::{HEADER_BYTES, Header, MAX_DESCRIPTORS};

use crate::AttachError;

/// Where the daemon's socket is when nobody says otherwise.
pub fn default_socket() -> PathBuf {
    let uid = rustix::process::getuid();
    if uid.is_root() {
        return "/run/vramd/vramd.sock".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => Path::new(&dir).join("vramd/vramd.sock"),
        // Not under /tmp: there another user could serve in our place.
        None => std::env::home_dir().unwrap_or_else(|| "/".into()).join(".local/state/vramd/vramd.sock"),
    }
}

/// Reads exactly one header, so that no descriptor of a later frame could be lost, with what came beside it, and
/// whether the kernel dropped some of that.
pub fn receive_header(stream: &Stream) -> Result<(Header, Vec<Descriptor>, bool), AttachError> {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    let mut dropped = false;
    let mut descriptors = Vec::new();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS as usize))];
    while filled < HEADER_BYTES {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut bytes[filled..])],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        // Owned at once: whatever fails below, they are closed.
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        let received = match received {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(io::Error::from)?,
        };
        dropped |= received.flags.contains(ReturnFlags::CTRUNC);
        if received.bytes == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        filled += received.bytes;
    }
    Ok((Header::decode(&bytes)?, descriptors, dropped))
}

/// How long a memory file is.
pub fn length(descriptor: &Descriptor) -> io::Result<u64> {
    Ok(rustix::fs::fstat(descriptor)?.st_size.cast_unsigned())
}

/// Ends what waits on a connection, from another thread.
#[derive(Debug)]
pub struct Stopper(Stream);

impl Stopper {
    pub fn of(stream: &Stream) -> io::Result<Self> {
        stream.try_clone().map(Self)
    }

    pub fn stop(&self) {
        // It fails for a connection that has ended.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}
