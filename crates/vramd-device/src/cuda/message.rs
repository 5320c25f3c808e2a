//! What the daemon and its loader say to each other, and the host memory that both have mapped.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::driver::{Failed, NoDriver};

/// What goes through a stage at once.
pub(super) const STAGE_BYTES: usize = 4 << 20;

/// A kind, and what comes with it.
const WORDS: usize = 6;
const MESSAGE_BYTES: usize = WORDS * 8;

/// What is asked of a loader. Segments are named by numbers of the daemon's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// With a socket and the memory behind a stage: serve it.
    Stage,
    /// With a descriptor: map it.
    Import {
        segment: u64,
        bytes: u64,
    },
    /// Unmap it.
    Forget {
        segment: u64,
    },
    Zero {
        segment: u64,
        offset: u64,
        bytes: u64,
    },
    /// From the stage.
    Push {
        segment: u64,
        offset: u64,
        bytes: u64,
    },
    /// To the stage.
    Pull {
        segment: u64,
        offset: u64,
        bytes: u64,
    },
    Copy {
        from: u64,
        from_offset: u64,
        to: u64,
        to_offset: u64,
        bytes: u64,
    },
}

impl Request {
    /// Whether the context is sound after such an error: for want of memory it is, and without a mapping that could not be had.
    pub(super) fn may_fail(self, failed: Failed) -> bool {
        failed.is_out_of_memory() || (matches!(self, Self::Import { .. }) && !failed.is_of_release())
    }

    fn words(self) -> [u64; WORDS] {
        match self {
            Self::Stage => [0; WORDS],
            Self::Import { segment, bytes } => [1, segment, bytes, 0, 0, 0],
            Self::Forget { segment } => [2, segment, 0, 0, 0, 0],
            Self::Zero { segment, offset, bytes } => [3, segment, offset, bytes, 0, 0],
            Self::Push { segment, offset, bytes } => [4, segment, offset, bytes, 0, 0],
            Self::Pull { segment, offset, bytes } => [5, segment, offset, bytes, 0, 0],
            Self::Copy { from, from_offset, to, to_offset, bytes } => {
                [6, from, from_offset, to, to_offset, bytes]
            }
        }
    }

    fn of(words: [u64; WORDS]) -> Option<Self> {
        Some(match words {
            [0, ..] => Self::Stage,
            [1, segment, bytes, ..] => Self::Import { segment, bytes },
            [2, segment, ..] => Self::Forget { segment },
            [3, segment, offset, bytes, ..] => Self::Zero { segment, offset, bytes },
            [4, segment, offset, bytes, ..] => Self::Push { segment, offset, bytes },
            [5, segment, offset, bytes, ..] => Self::Pull { segment, offset, bytes },
            [6, from, from_offset, to, to_offset, bytes] => {
                Self::Copy { from, from_offset, to, to_offset, bytes }
            }
            _ => return None,
        })
    }
}

/// Sends a request with its descriptors.
pub(super) fn ask(socket: impl AsFd, request: Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = request.words().map(u64::to_le_bytes).concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    retry(|| rustix::net::sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Waits for a request; None once the other side is gone.
pub(super) fn next(socket: impl AsFd) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry(|| {
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(&socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    match received?.bytes {
        0 => Ok(None),
        MESSAGE_BYTES => {
            let mut words = [0; WORDS];
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            let request = Request::of(words).ok_or(io::ErrorKind::InvalidData)?;
            Ok(Some((request, descriptors)))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Answers a request.
pub(super) fn answer(socket: impl AsFd, outcome: Result<(), Failed>) -> io::Result<()> {
    let (call, code) = outcome.err().map_or((0, 0), |failed| (failed.call, failed.code));
    let bytes = [call, code].map(u32::to_le_bytes).concat();
    retry(|| rustix::net::send(&socket, &bytes, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Says how the start went: nothing, or a failed call of the driver, or why else.
pub(super) fn greet(socket: impl AsFd, outcome: Result<(), &NoDriver>) -> io::Result<()> {
    match outcome {
        Ok(()) => answer(socket, Ok(())),
        Err(NoDriver::Call(failed)) => answer(socket, Err(*failed)),
        Err(other) => {
            let text = other.to_string();
            // Longer than an answer, which tells them apart.
            let text = format!("{text:8}.");
            retry(|| rustix::net::send(&socket, text.as_bytes(), SendFlags::NOSIGNAL))?;
            Ok(())
        }
    }
}

/// Waits for what [`greet`] says.
pub(super) fn greeted(socket: impl AsFd) -> io::Result<Result<(), Failed>> {
    let mut bytes = [0_u8; 512];
    let (count, _) = retry(|| rustix::net::recv(&socket, &mut bytes[..], RecvFlags::empty()))?;
    match bytes[..count].try_into() {
        Ok(answer) => Ok(outcome(answer)),
        Err(_) if count == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => {
            let text = String::from_utf8_lossy(&bytes[..count]);
            Err(io::Error::other(text.trim_end_matches('.').trim_end().to_owned()))
        }
    }
}

/// Waits for the answer to a request.
pub(super) fn answered(socket: impl AsFd) -> io::Result<Result<(), Failed>> {
    let mut bytes = [0_u8; 8];
    let (count, _) = retry(|| rustix::net::recv(&socket, &mut bytes[..], RecvFlags::empty()))?;
    if count != bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(outcome(bytes))
}

fn outcome(bytes: [u8; 8]) -> Result<(), Failed> {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (call, code) = (word(0), word(4));
    if code == 0 { Ok(()) } else { Err(Failed { call, code }) }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Shared host memory of [`STAGE_BYTES`], mapped.
pub(super) struct Mapped(NonNull<u8>);

// SAFETY: the mapping belongs to the process; who uses it when is the owner's business.
unsafe impl Send for Mapped {}

impl Mapped {
    pub fn new(memory: impl AsFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice. The memory has that many bytes, in pages that are
        // there already (`POPULATE`), so that none is missing later.
        let base = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::POPULATE;
            rustix::mm::mmap(ptr::null_mut(), STAGE_BYTES, access, flags, memory, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self(base))
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody refers to any more. It fails for arguments that no mapping has.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), STAGE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_arrive_as_they_were_sent() {
        let all = [
            Request::Stage,
            Request::Import { segment: 1, bytes: u64::MAX },
            Request::Forget { segment: 2 },
            Request::Zero { segment: 3, offset: 4, bytes: 5 },
            Request::Push { segment: 6, offset: 7, bytes: 8 },
            Request::Pull { segment: 9, offset: 10, bytes: 11 },
            Request::Copy { from: 12, from_offset: 13, to: 14, to_offset: 15, bytes: 16 },
        ];
        for request in all {
            assert_eq!(Request::of(request.words()), Some(request));
        }
        assert_eq!(Request::of([7; WORDS]), None);
    }
}
