//! A mapped attachment that follows moves, with one thread that waits for them.

use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use vramd_api::attach::{Access, Attach, Attached, Handle, Moved, Tensor};

use crate::connection::{AttachError, Attachment, Place, attach};
use crate::pages::Pages;
use crate::stream::Stopper;

/// The thread maps and waits, nothing more.
const STACK_BYTES: usize = 128 << 10;

/// Bytes of the daemon in this process's memory. Their address never changes, wherever the daemon moves them.
///
/// Dropping it ends the lease and unmaps them. When the daemon goes, they stay readable. A child of `fork` does not
/// have them mapped; it keeps the lease until it ends.
///
/// A request with `moves` lets the daemon move them. Leave it out for memory that the kernel or a device reads or writes
/// by itself (`O_DIRECT`, `io_uring` buffers, RDMA, registered with CUDA) or that is locked: those keep the old pages.
#[derive(Debug)]
pub struct Mapped {
    attached: Attached,
    tensors: Vec<Tensor>,
    shared: Arc<Shared>,
    stopper: Stopper,
    follower: Option<JoinHandle<()>>,
    /// The process that attached: a child of its has no follower.
    process: u32,
}

#[derive(Debug)]
struct Shared {
    pages: Pages,
    generation: AtomicU64,
    ended: OnceLock<Ended>,
    /// Of a daemon that cannot be understood: while it is open, the daemon gives the pages to nobody else.
    kept: Mutex<Option<Attachment>>,
}

/// Why an attachment follows no moves any more.
#[derive(Debug)]
pub enum Ended {
    /// The daemon is gone, and the pages stay as they are; or it has ended the attachment by force (`vramd clear
    /// --force`), and the pages may soon be others'.
    Closed,
    /// The daemon cannot be understood. It goes on holding the pages.
    Broken(AttachError),
}

impl Mapped {
    /// Attaches what `request` names and maps it. Blocks until the daemon answers.
    pub fn attach(socket: &Path, request: &Attach) -> Result<Self, AttachError> {
        // A system whose pages cannot be replaced under a reader leaves the bytes where they are.
        let request = Attach { moves: request.moves && Pages::FOLLOW, ..request.clone() };
        Self::new(attach(socket, &request)?)
    }

    pub(crate) fn new(mut attachment: Attachment) -> Result<Self, AttachError> {
        let attached = attachment.attached.clone();
        let place = Place {
            moved: Moved {
                generation: attached.generation,
                device_id: attached.device_id.clone(),
                segments: attached.segments.clone(),
                block: attached.block.clone(),
            },
            descriptors: std::mem::take(&mut attachment.descriptors),
        };
        let shared = Arc::new(Shared {
            pages: map(&place, attached.access, false)?,
            generation: AtomicU64::new(attached.generation),
            ended: OnceLock::new(),
            kept: Mutex::new(None),
        });
        let tensors = std::mem::take(&mut attachment.tensors);
        let stopper = Stopper::of(&attachment.stream)?;
        let follower = {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("vramd-moves".to_owned()).stack_size(STACK_BYTES);
            thread.spawn(move || shared.follow(attachment))?
        };
        let process = std::process::id();
        Ok(Self { attached, tensors, shared, stopper, follower: Some(follower), process })
    }

    /// What the daemon answered; its place is the first one.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Counts up with every move.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Why it follows no moves any more; `None` while it does.
    pub fn ended(&self) -> Option<&Ended> {
        self.shared.ended.get()
    }

    /// How many bytes are mapped from [`as_ptr`](Self::as_ptr) on.
    pub fn bytes(&self) -> u64 {
        self.attached.block.bytes
    }

    /// The first byte, valid until this is dropped.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.shared.pages.block()
    }

    /// Copies bytes from `offset` on.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) {
        let from = self.range(offset, into.len());
        // SAFETY: the range is mapped and `into` is memory of our own, so that they do not overlap. A writer elsewhere
        // may change bytes meanwhile: the copy then has some of both, and nobody holds a reference to them.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies bytes to `offset`, for every process that has them attached.
    ///
    /// # Panics
    /// If they do not lie inside, or were not attached for writing.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) {
        assert_eq!(self.attached.access, Access::Write, "the attachment is read-only");
        let to = self.range(offset, bytes.len());
        // SAFETY: the range is mapped for writing and does not overlap `bytes`. Whoever holds a slice of it has promised
        // that nobody writes.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// The bytes in place.
    ///
    /// # Safety
    /// No process writes to them meanwhile. Those of a model are never written; those of an allocation may be, by
    /// whoever attaches it for writing.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is mapped for as long as `self` lives, with the same bytes through every move; that nobody
        // writes is this function's contract.
        unsafe { std::slice::from_raw_parts(self.as_ptr().as_ptr(), self.bytes() as usize) }
    }

    fn range(&self, offset: u64, bytes: usize) -> *mut u8 {
        let whole = self.bytes();
        let inside = offset.checked_add(bytes as u64).is_some_and(|end| end <= whole);
        assert!(inside, "{bytes} bytes at {offset} do not lie inside {whole}");
        // SAFETY: the offset lies inside the mapped block.
        unsafe { self.as_ptr().as_ptr().add(offset as usize) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // The connection is the parent's too, and the thread is only there. The pages were never mapped here.
            return std::mem::forget(self.follower.take());
        }
        // Ends the lease, and the wait of the thread. The pages go after it: it may be replacing them.
        self.stopper.stop();
        if let Some(follower) = self.follower.take() {
            let _ = follower.join();
        }
    }
}

impl Shared {
    fn follow(&self, mut attachment: Attachment) {
        let ended = loop {
            match attachment.next_move() {
                Ok(Some(place)) => {
                    if let Err(error) = self.take(&mut attachment, place) {
                        break Ended::Broken(error);
                    }
                }
                Ok(None) => break Ended::Closed,
                Err(error) => break Ended::Broken(error),
            }
        };
        if matches!(ended, Ended::Broken(_)) {
            *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(attachment);
        }
        let _ = self.ended.set(ended);
    }

    fn take(&self, attachment: &mut Attachment, mut place: Place) -> Result<(), AttachError> {
        // SAFETY: the daemon says that the new place has the same bytes, and it is trusted with them: it could write
        // others into the old place as well.
        let replaced =
            map(&place, attachment.attached.access, true).and_then(|new| unsafe { self.pages.replace(new) });
        if let Err(error) = replaced {
            return attachment.decline(&place, format!("the new pages could not be mapped: {error}"));
        }
        // Mapped: each would keep a place in the table of open files.
        place.descriptors.clear();
        let generation = place.moved.generation;
        attachment.accept(place)?;
        self.generation.store(generation, Ordering::Release);
        Ok(())
    }
}

fn map(place: &Place, access: Access, filled: bool) -> std::io::Result<Pages> {
    let block = &place.moved.block;
    let number = block.segment as usize;
    if place.moved.segments[number].handle != Handle::HOST {
        return Err(std::io::Error::new(std::io::ErrorKind::Unsupported, "only host memory can be mapped"));
    }
    Pages::map(&place.descriptors[number], &place.moved.segments[number], block, access, filled)
}
