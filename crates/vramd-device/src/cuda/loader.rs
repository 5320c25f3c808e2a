//! The loader: the child process that has the context. [`serve`] is its whole life; [`Loader`] is the daemon's side.
//!
//! ```text
//! started ── ready ──▶ serving ──▶ ended: by the daemon, with it, or because a call of the driver failed
//!    └─ no context: says why, ends
//! ```
//!
//! A context is good for nothing after most errors, so any but a lack of memory, and but a mapping that cannot be had, ends the process once
//! the error is told; the next call starts another one. Each stage has a socket and a thread of its own: what one thread of the daemon waits for
//! holds up no other.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Signal, getpid, kill_process};
use uuid::Uuid;

use super::adapter::Adapter;
use super::driver::{Address, Context, Driver, Failed, NoDriver, Ordinal, Stream};
use super::message::{self, Mapped, Request, STAGE_BYTES};
use crate::{Call, DeviceError};

/// How long an ended loader may take to be gone.
const FAREWELL: Duration = Duration::from_secs(5);
/// Copies at one time, and pinned memory: more would wait for the card. More than the threads that need a stage of another
/// card while they have one (the mover's).
const STAGES: usize = 8;

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
    /// The driver refused a call, there or here.
    Driver(Failed),
    /// What this process lacks for the call; the loader is as it was.
    Here(&'static str, io::Error),
    /// The loader ended, or could not be started.
    Gone(io::Error),
    /// It did not answer in time.
    Hangs(Duration),
}

impl From<Failed> for Trouble {
    fn from(failed: Failed) -> Self {
        Self::Driver(failed)
    }
}

impl Trouble {
    pub fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        match self {
            Self::Driver(failed) => failed.explain(call, requested, available),
            Self::Here(native, source) => DeviceError::Native { call, native, source },
            Self::Gone(source) => DeviceError::Interrupted { call, source },
            Self::Hangs(patience) => {
                DeviceError::Lost { reason: format!("no answer of its driver in {patience:?}") }
            }
        }
    }
}

/// A running loader. Ended, what it had mapped is free.
pub(super) struct Loader {
    child: Mutex<Child>,
    control: OwnedFd,
    patience: Duration,
    /// The segments that it has mapped.
    mapped: Mutex<HashSet<u64>>,
    stages: Mutex<Stages>,
    returned: Condvar,
    used: Mutex<Instant>,
    failed: AtomicBool,
}

#[derive(Default)]
struct Stages {
    idle: Vec<Stage>,
    count: usize,
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
    /// Starts one and waits until its context is open. A card that answers nothing for `patience` will not do it any more.
    pub fn start(command: &LoaderCommand, card: &Adapter, patience: Duration) -> Result<Self, Trouble> {
        let here = |error| Trouble::Here("starting a loader", error);
        let (control, theirs) = pair().map_err(here)?;
        set_socket_timeout(&control, Timeout::Recv, Some(patience)).map_err(|errno| here(errno.into()))?;
        let child = Command::new(&command.program)
            .arg0("vramd")
            .args(&command.arguments)
            .arg(&card.libraries.cuda)
            .arg(card.id.to_string())
            // Others than those that it may copy from are none of its business, and each would cost time.
            .env("CUDA_VISIBLE_DEVICES", [slice::from_ref(&card.uuid), &card.peers].concat().join(","))
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            // Ctrl-C is for the daemon, which may need it still.
            .process_group(0)
            .spawn()
            .map_err(here)?;
        let loader = Self {
            child: Mutex::new(child),
            control,
            patience,
            mapped: Mutex::default(),
            stages: Mutex::default(),
            returned: Condvar::new(),
            used: Mutex::new(Instant::now()),
            failed: AtomicBool::new(false),
        };
        message::greeted(&loader.control).map_err(|error| loader.broken(error))??;
        Ok(loader)
    }

    fn broken(&self, error: io::Error) -> Trouble {
        if error.kind() == io::ErrorKind::WouldBlock {
            Trouble::Hangs(self.patience)
        } else {
            Trouble::Gone(error)
        }
    }

    /// A call of it has failed, or it was ended by others.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || !matches!(lock(&self.child).try_wait(), Ok(None))
    }

    /// Nobody has needed it for so long, or does now.
    pub fn is_idle_for(&self, time: Duration) -> bool {
        let stages = lock(&self.stages);
        stages.idle.len() == stages.count && lock(&self.used).elapsed() >= time
    }

    /// Lends a stage to `work`; waits for one while too many have one.
    pub fn staged(&self, work: impl FnOnce(&mut Stage) -> Result<(), Trouble>) -> Result<(), Trouble> {
        let mut stage = self.take()?;
        let done = work(&mut stage);
        *lock(&self.used) = Instant::now();
        let mut stages = lock(&self.stages);
        stages.idle.push(stage);
        drop(stages);
        self.returned.notify_one();
        done
    }

    fn take(&self) -> Result<Stage, Trouble> {
        let mut stages = lock(&self.stages);
        let full = |stages: &mut Stages| stages.idle.is_empty() && stages.count == STAGES;
        while full(&mut stages) && !self.failed.load(Ordering::Relaxed) {
            stages = self.returned.wait(stages).unwrap_or_else(PoisonError::into_inner);
        }
        if self.failed.load(Ordering::Relaxed) {
            return Err(Trouble::Gone(io::ErrorKind::BrokenPipe.into()));
        }
        if let Some(stage) = stages.idle.pop() {
            return Ok(stage);
        }
        stages.count += 1;
        drop(stages);
        self.stage().inspect_err(|_| {
            lock(&self.stages).count -= 1;
            self.returned.notify_one();
        })
    }

    fn stage(&self) -> Result<Stage, Trouble> {
        let made = || -> io::Result<_> {
            let memory = rustix::fs::memfd_create("vramd stage", MemfdFlags::CLOEXEC)?;
            rustix::fs::ftruncate(&memory, STAGE_BYTES as u64)?;
            let (socket, theirs) = pair()?;
            set_socket_timeout(&socket, Timeout::Recv, Some(self.patience))?;
            Ok((Stage { socket, memory: Mapped::new(&memory)? }, theirs, memory))
        };
        let (stage, theirs, memory) =
            made().map_err(|error| Trouble::Here("making a staging buffer", error))?;
        message::ask(&self.control, Request::Stage, &[theirs.as_fd(), memory.as_fd()])
            .map_err(|error| self.fail(self.broken(error)))?;
        Ok(stage)
    }

    /// Asks by a stage, and waits for the answer.
    pub fn ask(&self, stage: &mut Stage, request: Request) -> Result<(), Trouble> {
        self.ask_with(stage, request, &[])
    }

    fn ask_with(
        &self,
        stage: &mut Stage,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Trouble> {
        let answer =
            message::ask(&stage.socket, request, descriptors).and_then(|()| message::answered(&stage.socket));
        match answer.map_err(|error| self.broken(error)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(failed)) if request.may_fail(failed) => Err(failed.into()),
            Ok(Err(failed)) => Err(self.fail(failed.into())),
            Err(trouble) => Err(self.fail(trouble)),
        }
    }

    /// It is of no more use: what waits for it need not wait longer.
    fn fail(&self, trouble: Trouble) -> Trouble {
        self.kill();
        trouble
    }

    /// Has a segment mapped, unless it is; `export` gives its descriptor.
    pub fn map(
        &self,
        stage: &mut Stage,
        (segment, bytes): (u64, u64),
        export: impl FnOnce() -> Result<OwnedFd, Failed>,
    ) -> Result<(), Trouble> {
        let mut mapped = lock(&self.mapped);
        if !mapped.contains(&segment) {
            let descriptor = export()?;
            self.ask_with(stage, Request::Import { segment, bytes }, &[descriptor.as_fd()])?;
            mapped.insert(segment);
        }
        Ok(())
    }

    /// Has it let go of a segment. If it cannot, it ends, and lets go of all.
    pub fn forget(&self, segment: u64) {
        let was_mapped = lock(&self.mapped).remove(&segment);
        let forget = |stage: &mut Stage| self.ask(stage, Request::Forget { segment });
        let forgotten = !was_mapped || self.staged(forget).is_ok();
        // Whoever found it failed has ended it, or does: this waits until that is done.
        if !forgotten || self.is_failed() {
            self.kill();
        }
    }

    /// Ends it, and waits until it is gone.
    pub fn kill(&self) {
        self.failed.store(true, Ordering::Relaxed);
        // Whoever is about to wait for a stage has seen it, or is waiting.
        drop(lock(&self.stages));
        self.returned.notify_all();
        let mut child = lock(&self.child);
        // One that has ended cannot be killed.
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

impl Drop for Loader {
    fn drop(&mut self) {
        self.kill();
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
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single step.
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

/// What a thread of the loader has, once it has needed it.
struct Thread {
    memory: Mapped,
    stream: Option<Stream>,
    is_pinned: bool,
    /// Something could not be given back: only the end of the process does that now.
    is_leaking: bool,
}

/// Serves a daemon until it is gone, and ends the process then. Only what is no socket of a daemon's comes back as an error.
/// `control` is what the process was started with.
pub fn serve(library: &Path, card: &str, control: &OwnedFd) -> io::Result<()> {
    let opened = Server::open(library, card);
    message::greet(control, opened.as_ref().map(|_| ()))?;
    let Ok(server) = opened.map(Arc::new) else { end() };
    while let Ok(Some((Request::Stage, descriptors))) = message::next(control) {
        let Ok([socket, memory]) = <[_; 2]>::try_from(descriptors) else { break };
        let server = server.clone();
        let thread = std::thread::Builder::new().name("stage".to_owned());
        let started = thread.spawn(move || {
            if let Err(error) = server.stage(&socket, &memory) {
                // The context may be broken, and the daemon has been told or is gone.
                tracing::warn!(%error, "a loader ends");
                end();
            }
        });
        if started.is_err() {
            break;
        }
    }
    end()
}

/// Ends this process at once. The driver's own end would run beside threads that are in it.
fn end() -> ! {
    let _ = kill_process(getpid(), Signal::KILL);
    std::process::abort()
}

impl Server {
    fn open(library: &Path, card: &str) -> Result<Self, NoDriver> {
        let driver = Driver::load(library)?;
        let ordinal = driver.find(Uuid::parse_str(card).map_err(|_| NoDriver::Hidden)?)?;
        let context = SharedContext(driver.open_context(ordinal)?);
        Ok(Self { driver, ordinal, context, segments: Mutex::default() })
    }

    fn stage(&self, socket: &OwnedFd, memory: &OwnedFd) -> io::Result<()> {
        let memory = Mapped::new(memory)?;
        let mut thread = Thread { memory, stream: None, is_pinned: false, is_leaking: false };
        while let Some((request, descriptors)) = message::next(socket)? {
            let outcome = self.carry_out(request, descriptors.first(), &mut thread);
            message::answer(socket, outcome)?;
            if let Err(failed) = outcome
                && (thread.is_leaking || !request.may_fail(failed))
            {
                return Err(io::Error::other(failed.to_string()));
            }
        }
        // The daemon lets go of a stage only with the whole loader: what is pinned stays mapped until then.
        std::mem::forget(thread);
        Ok(())
    }

    /// This thread's stream, made with its first request.
    fn stream(&self, thread: &mut Thread) -> Result<Stream, Failed> {
        if let Some(stream) = thread.stream {
            return Ok(stream);
        }
        self.driver.enter(self.context.0)?;
        Ok(*thread.stream.insert(self.driver.new_stream()?))
    }

    /// The stage's memory, pinned with the first copy.
    fn staged(&self, thread: &mut Thread, bytes: u64) -> Result<*mut u8, Failed> {
        if bytes > STAGE_BYTES as u64 {
            return Err(Failed::UNKNOWN);
        }
        if !std::mem::replace(&mut thread.is_pinned, true) {
            // SAFETY: it is never unmapped: `stage` forgets it, or the process ends.
            if let Err(failed) = unsafe { self.driver.register(thread.memory.as_ptr(), STAGE_BYTES) } {
                tracing::warn!(%failed, "staging memory is not pinned: copies are slower");
            }
        }
        Ok(thread.memory.as_ptr())
    }

    fn carry_out(
        &self,
        request: Request,
        descriptor: Option<&OwnedFd>,
        thread: &mut Thread,
    ) -> Result<(), Failed> {
        let driver = &self.driver;
        let stream = self.stream(thread)?;
        let at = |segment: u64, offset: u64, bytes: u64| {
            let (address, size) = *lock(&self.segments).get(&segment).ok_or(Failed::UNKNOWN)?;
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= size);
            if inside { Ok(address + offset) } else { Err(Failed::UNKNOWN) }
        };
        match request {
            Request::Stage => Err(Failed::UNKNOWN),
            Request::Import { segment, bytes } => {
                let imported = driver.import(descriptor.ok_or(Failed::UNKNOWN)?)?;
                let mapped = driver.map(self.ordinal, imported, bytes);
                // The mapping keeps the memory.
                let released = driver.release(imported);
                thread.is_leaking = released.is_err();
                released?;
                lock(&self.segments).insert(segment, (mapped?, bytes));
                Ok(())
            }
            Request::Forget { segment } => {
                let (address, bytes) = lock(&self.segments).remove(&segment).ok_or(Failed::UNKNOWN)?;
                // SAFETY: mapped by `Import`; the daemon asks once everything on it has been answered.
                let unmapped = unsafe { driver.unmap(address, bytes) };
                thread.is_leaking = unmapped.is_err();
                unmapped
            }
            Request::Zero { segment, offset, bytes } => {
                let to = at(segment, offset, bytes)?;
                // SAFETY: inside of a mapping, which the daemon has nobody else use.
                unsafe { driver.zero(to, bytes, stream) }
            }
            Request::Push { segment, offset, bytes } => {
                let to = at(segment, offset, bytes)?;
                let from = self.staged(thread, bytes)?;
                // SAFETY: as for `Zero`; the stage is this thread's until it answers.
                unsafe { driver.to_device(to, from, bytes, stream) }
            }
            Request::Pull { segment, offset, bytes } => {
                let from = at(segment, offset, bytes)?;
                let to = self.staged(thread, bytes)?;
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
