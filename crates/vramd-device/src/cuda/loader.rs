//! The loader: the child process that has the context. [`serve`] is its whole life; [`Loader`] is the daemon's side.
//!
//! ```text
//! started ── ready ──▶ serving ──▶ ended: the daemon's end of the socket closed, or a call of the driver failed
//!    └─ no context: says why, ends
//! ```
//!
//! A context is good for nothing after most errors, so any but a lack of memory ends the process once the error is told; the
//! next call starts another one. Each stage has a socket and a thread of its own: what one thread of the daemon waits for
//! holds up no other.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use uuid::Uuid;

use super::driver::{Address, Context, Driver, Failed, NoDriver, Ordinal, Stream};
use super::message::{self, Mapped, Request, STAGE_BYTES};
use crate::{Call, DeviceError};

/// A card that answers nothing for so long will not do it any more.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long an ended loader may take to be gone.
const FAREWELL: Duration = Duration::from_secs(5);
/// Stages that wait for their next use; more are made when more threads copy.
const IDLE_STAGES: usize = 8;

/// How to start a loader: a program that calls [`serve`] with what follows `arguments` (the path of the CUDA library and the uuid
/// of the card) and with its standard input.
#[derive(Debug, Clone)]
pub struct LoaderCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

/// Why a call by way of the loader failed.
#[derive(Debug)]
pub(super) enum Trouble {
    Driver(Failed),
    /// The process ended, or could not be started.
    Gone(io::Error),
    /// It did not answer in time.
    Hangs,
}

impl From<Failed> for Trouble {
    fn from(failed: Failed) -> Self {
        Self::Driver(failed)
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::WouldBlock { Self::Hangs } else { Self::Gone(error) }
    }
}

impl Trouble {
    fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Driver(failed) if failed.is_out_of_memory())
    }

    pub fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        match self {
            Self::Driver(failed) => failed.explain(call, requested, available),
            Self::Gone(source) => DeviceError::Native { call, native: "the loader process", source },
            Self::Hangs => DeviceError::Lost {
                reason: format!("no answer of its driver in {} seconds", PATIENCE.as_secs()),
            },
        }
    }
}

/// A running loader. Dropped, it ends, and what it had mapped is free.
pub(super) struct Loader {
    /// No two loaders of this process have the same.
    pub number: u64,
    child: Mutex<Child>,
    control: OwnedFd,
    idle: Mutex<Vec<Stage>>,
    used: Mutex<Instant>,
    failed: AtomicBool,
}

/// A socket to a thread of the loader, and host memory that both have mapped. One thread has it at a time.
pub(super) struct Stage {
    socket: OwnedFd,
    memory: Mapped,
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

impl Loader {
    /// Starts one and waits until its context is open.
    pub fn start(command: &LoaderCommand, library: &Path, card: Uuid) -> Result<Self, Trouble> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let (control, theirs) = pair()?;
        set_socket_timeout(&control, Timeout::Recv, Some(PATIENCE)).map_err(io::Error::from)?;
        let child = Command::new(&command.program)
            .arg0("vramd")
            .args(&command.arguments)
            .arg(library)
            .arg(card.to_string())
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        let loader = Self {
            number: LAST.fetch_add(1, Ordering::Relaxed) + 1,
            child: Mutex::new(child),
            control,
            idle: Mutex::default(),
            used: Mutex::new(Instant::now()),
            failed: AtomicBool::new(false),
        };
        message::answered(&loader.control)??;
        Ok(loader)
    }

    /// A call of it has failed, or it was ended by others.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || !matches!(lock(&self.child).try_wait(), Ok(None))
    }

    /// For how long nobody has needed it.
    pub fn idle_for(&self) -> Duration {
        lock(&self.used).elapsed()
    }

    /// Lends a stage to `work`.
    pub fn staged<T>(&self, work: impl FnOnce(&mut Stage) -> Result<T, Trouble>) -> Result<T, Trouble> {
        let idle = lock(&self.idle).pop();
        let done = idle.map_or_else(|| self.stage(), Ok).and_then(|mut stage| {
            let done = work(&mut stage);
            let mut idle = lock(&self.idle);
            // After an error its socket may be out of step.
            if done.is_ok() && idle.len() < IDLE_STAGES {
                idle.push(stage);
            }
            done
        });
        *lock(&self.used) = Instant::now();
        if done.as_ref().is_err_and(|trouble| !trouble.is_out_of_memory()) {
            self.failed.store(true, Ordering::Relaxed);
        }
        done
    }

    fn stage(&self) -> Result<Stage, Trouble> {
        let memory = rustix::fs::memfd_create("vramd stage", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&memory, STAGE_BYTES as u64).map_err(io::Error::from)?;
        let (socket, theirs) = pair()?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).map_err(io::Error::from)?;
        message::ask(&self.control, Request::Stage, &[theirs.as_fd(), memory.as_fd()])?;
        Ok(Stage { socket, memory: Mapped::new(&memory)? })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        // Nothing that it does is of use any more, and its mappings hold memory. One that has ended cannot be killed.
        let _ = child.kill();
        let begun = Instant::now();
        while begun.elapsed() < FAREWELL {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
        tracing::warn!(pid = child.id(), "a loader does not end: its driver hangs");
    }
}

impl Stage {
    /// The first `bytes` of it.
    pub fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= STAGE_BYTES);
        // SAFETY: mapped for as long as the stage lives; the loader uses it only between a request and its answer, and
        // whoever asks holds no slice of it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), bytes) }
    }

    /// Asks, and waits for the answer.
    pub fn ask(&mut self, request: Request) -> Result<(), Trouble> {
        message::ask(&self.socket, request, &[])?;
        Ok(message::answered(&self.socket)??)
    }

    /// Has the loader map a segment.
    pub fn import(&mut self, segment: u64, bytes: u64, descriptor: &OwnedFd) -> Result<(), Trouble> {
        message::ask(&self.socket, Request::Import { segment, bytes }, &[descriptor.as_fd()])?;
        Ok(message::answered(&self.socket)??)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No operation under these locks can leave what they guard half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The loader's side.
struct Server {
    driver: Driver,
    ordinal: Ordinal,
    context: SharedContext,
    segments: Mutex<HashMap<u64, (Address, u64)>>,
}

struct SharedContext(Context);

// SAFETY: a context may be made current in any number of threads.
unsafe impl Send for SharedContext {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedContext {}

/// Serves a daemon until it is gone. `control` is the socket that the process was started with.
pub fn serve(library: &Path, card: &str, control: &OwnedFd) -> io::Result<()> {
    let opened = Server::open(library, card);
    let outcome = match &opened {
        Ok(_) => Ok(()),
        Err((_, failed)) => Err(*failed),
    };
    message::answer(control, outcome)?;
    let server = Arc::new(opened.map_err(|(error, _)| io::Error::other(error))?);
    while let Some((request, descriptors)) = message::next(control)? {
        let (Request::Stage, Ok([socket, memory])) = (request, <[_; 2]>::try_from(descriptors)) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let server = server.clone();
        std::thread::Builder::new().name("stage".to_owned()).spawn(move || {
            if let Err(error) = server.stage(&socket, &memory) {
                // The context may be broken, and the daemon has been told or is gone.
                tracing::debug!(%error, "a loader ends");
                std::process::exit(1);
            }
        })?;
    }
    Ok(())
}

impl Server {
    fn open(library: &Path, card: &str) -> Result<Self, (NoDriver, Failed)> {
        let unknown = Failed { call: u32::MAX, code: u32::MAX };
        let driver = Driver::load(library).map_err(|error| (error, unknown))?;
        let told = |failed: Failed| (failed.into(), failed);
        let visible = driver.visible().map_err(told)?;
        let found = visible.into_iter().find(|(_, id)| id.to_string() == card);
        let (ordinal, _) = found.ok_or_else(|| told(unknown))?;
        let context = SharedContext(driver.open_context(ordinal).map_err(told)?);
        Ok(Self { driver, ordinal, context, segments: Mutex::default() })
    }

    fn stage(&self, socket: &OwnedFd, memory: &OwnedFd) -> io::Result<()> {
        let memory = Mapped::new(memory)?;
        let mut stream = None;
        while let Some((request, descriptors)) = message::next(socket)? {
            let outcome = self
                .stream(&mut stream, &memory)
                .and_then(|stream| self.carry_out(request, descriptors.first(), stream, &memory));
            message::answer(socket, outcome)?;
            if let Err(failed) = outcome
                && !failed.is_out_of_memory()
            {
                return Err(io::Error::other(format!("{} failed with {}", failed.name(), failed.code)));
            }
        }
        // Registered memory must stay mapped while the context lives.
        std::mem::forget(memory);
        Ok(())
    }

    /// This thread's stream, once its first request is here.
    fn stream(&self, stream: &mut Option<Stream>, memory: &Mapped) -> Result<Stream, Failed> {
        if let Some(stream) = stream {
            return Ok(*stream);
        }
        self.driver.enter(self.context.0)?;
        let made = self.driver.new_stream()?;
        // SAFETY: it is never unmapped: `stage` forgets it, or the process ends.
        if let Err(failed) = unsafe { self.driver.register(memory.as_ptr(), STAGE_BYTES) } {
            tracing::warn!(code = failed.code, "staging memory is not pinned: copies are slower");
        }
        Ok(*stream.insert(made))
    }

    fn carry_out(
        &self,
        request: Request,
        descriptor: Option<&OwnedFd>,
        stream: Stream,
        memory: &Mapped,
    ) -> Result<(), Failed> {
        let driver = &self.driver;
        let unknown = Failed { call: u32::MAX, code: u32::MAX };
        let at = |segment: u64, offset: u64, bytes: u64| {
            let (address, size) = *lock(&self.segments).get(&segment).ok_or(unknown)?;
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= size);
            if inside { Ok(address + offset) } else { Err(unknown) }
        };
        let staged =
            |bytes: u64| if bytes <= STAGE_BYTES as u64 { Ok(memory.as_ptr()) } else { Err(unknown) };
        match request {
            Request::Stage => Err(unknown),
            Request::Import { segment, bytes } => {
                let imported = driver.import(descriptor.ok_or(unknown)?)?;
                let mapped = driver.map(self.ordinal, imported, bytes);
                // The mapping keeps the memory.
                let released = driver.release(imported);
                lock(&self.segments).insert(segment, (mapped?, bytes));
                released
            }
            Request::Forget { segment } => {
                let (address, bytes) = lock(&self.segments).remove(&segment).ok_or(unknown)?;
                // SAFETY: mapped by `Import`; the daemon asks once everything on it has been answered.
                unsafe { driver.unmap(address, bytes) }
            }
            Request::Zero { segment, offset, bytes } => {
                let to = at(segment, offset, bytes)?;
                // SAFETY: inside of a mapping, which the daemon has nobody else use.
                unsafe { driver.zero(to, bytes, stream) }
            }
            Request::Push { segment, offset, bytes } => {
                let to = at(segment, offset, bytes)?;
                let from = staged(bytes)?;
                // SAFETY: as for `Zero`; the stage is this thread's until it answers.
                unsafe { driver.to_device(to, from, bytes, stream) }
            }
            Request::Pull { segment, offset, bytes } => {
                let from = at(segment, offset, bytes)?;
                let to = staged(bytes)?;
                // SAFETY: as for `Push`.
                unsafe { driver.to_host(to, from, bytes, stream) }
            }
            Request::Copy { from, from_offset, to, to_offset, bytes } => {
                let (from, to) = (at(from, from_offset, bytes)?, at(to, to_offset, bytes)?);
                // SAFETY: as for `Zero`; the daemon has checked that they do not overlap.
                unsafe { driver.on_device(to, from, bytes, stream) }
            }
        }
    }
}
