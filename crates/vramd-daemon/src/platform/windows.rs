//! A named pipe, and the system's calls for processes and files.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::windows::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::windows::named_pipe::{ClientOptions, NamedPipeServer};
use vramd_api::attach::HEADER_BYTES;
use vramd_core::models::FileIdentity;
use vramd_device::Descriptor;
use vramd_windows::{Process, pipe};

use super::OpenError;

/// How long the name of a pipe may take to be free.
const FREED: Duration = Duration::from_secs(2);

/// So that a directory opens too.
const BACKUP_SEMANTICS: u32 = 0x0200_0000;

/// The system knows users by more than a number, and lets only this process's own (and administrators) come to its pipe.
pub fn own_uid() -> u32 {
    0
}

/// Whether a process has not ended.
pub fn lives(pid: u32) -> bool {
    Process::open(pid).is_ok_and(|process| process.lives())
}

/// The process alone: the system does not say what it started.
pub fn with_descendants(pid: u32) -> Vec<u32> {
    vec![pid]
}

/// The user that a process runs as: here all clients are the daemon's own user.
pub fn uid_of(pid: u32) -> Option<u32> {
    lives(pid).then_some(own_uid())
}

/// What a process calls itself.
pub fn command(pid: u32) -> String {
    Process::open(pid).map_or_else(|_| "?".to_owned(), |process| name(&process))
}

fn name(process: &Process) -> String {
    let program = process.program().unwrap_or_default();
    let name = program.file_stem().map(|name| name.to_string_lossy().replace(char::is_control, "?"));
    name.unwrap_or_else(|| "?".to_owned())
}

/// The local socket: a pipe's name, and the end that the next client comes to.
#[derive(Debug)]
pub struct LocalListener {
    path: PathBuf,
    next: NamedPipeServer,
}

/// A connection to it.
#[derive(Debug)]
pub struct LocalStream {
    pipe: NamedPipeServer,
    /// Held from the beginning, so that its number becomes no other's.
    client: io::Result<Process>,
    /// What was read ahead.
    first: Option<u8>,
}

impl LocalListener {
    /// Makes the pipe. Where another process has it already, this is an error, so that nobody serves in another's place.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let begun = Instant::now();
        loop {
            // Not every system heeds that it has to be the first.
            let there = ClientOptions::new().open(path);
            let free = there.is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            match if free { pipe::serve(path, true) } else { Err(io::ErrorKind::PermissionDenied.into()) } {
                Ok(next) => return Ok(Self { path: path.to_owned(), next }),
                // Clients of a daemon that was killed keep its name for a moment.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && begun.elapsed() < FREED => {
                    std::thread::park_timeout(FREED / 20);
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves on it"));
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub async fn accept(&mut self) -> io::Result<LocalStream> {
        self.next.connect().await?;
        // There is always an end to come to: without one, clients would hear that nobody serves.
        let next = pipe::serve(&self.path, false)?;
        let pipe = std::mem::replace(&mut self.next, next);
        // It may be gone already, or not ours to open.
        let client = Process::client_of(&pipe);
        Ok(LocalStream { pipe, client, first: None })
    }
}

impl LocalStream {
    /// The process at the other end, and its user.
    pub fn peer(&self) -> io::Result<(u32, u32)> {
        Ok((vramd_windows::client_pid(&self.pipe)?, own_uid()))
    }

    /// The first byte, which is read again afterwards; None when the connection ended before.
    pub async fn peek(&mut self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        if self.pipe.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        self.first = Some(byte[0]);
        Ok(self.first)
    }

    /// Sends a frame with its descriptor, opened in the client's process; answers how many bytes went along.
    pub async fn send_with(&mut self, frame: &[u8], descriptor: &Descriptor) -> io::Result<usize> {
        let client = self.client.as_ref().map_err(|error| {
            io::Error::new(error.kind(), format!("the client's process cannot be opened: {error}"))
        })?;
        let given = client.give(descriptor)?;
        let (header, body) = frame.split_at(HEADER_BYTES);
        let whole = [header, &given.value().to_le_bytes(), body].concat();
        self.pipe.write_all(&whole).await?;
        given.keep();
        Ok(frame.len())
    }
}

impl AsyncRead for LocalStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if into.remaining() > 0 {
            if let Some(first) = self.first.take() {
                into.put_slice(&[first]);
                return Poll::Ready(Ok(()));
            }
        }
        match Pin::new(&mut self.pipe).poll_read(context, into) {
            // How a pipe ends.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Poll::Ready(Ok(())),
            read => read,
        }
    }
}

impl AsyncWrite for LocalStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(context)
    }
}

/// A directory that files are opened beneath.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// `path` has all its links followed.
    pub fn open(path: &Path) -> io::Result<Self> {
        std::fs::read_dir(path)?;
        Ok(Self(path.to_owned()))
    }

    /// Opens a file or a directory for reading. Nothing leads out: where the open file really is decides, which no change
    /// of the tree can alter any more.
    pub fn open_beneath(&self, below: &Path) -> Result<File, OpenError> {
        const INVALID_NAME: i32 = 123;
        const TOO_LONG: i32 = 206;
        const CANNOT_RESOLVE: i32 = 1921;
        let opened = OpenOptions::new().read(true).custom_flags(BACKUP_SEMANTICS).open(self.0.join(below));
        let file = opened.map_err(|error| match (error.kind(), error.raw_os_error()) {
            (_, Some(INVALID_NAME | TOO_LONG | CANNOT_RESOLVE)) => OpenError::Unfollowable,
            (io::ErrorKind::NotFound | io::ErrorKind::NotADirectory, _) => OpenError::NotThere,
            (io::ErrorKind::PermissionDenied, _) => OpenError::Denied,
            _ => OpenError::Failed(error),
        })?;
        match vramd_windows::final_path(&file) {
            Ok(path) if path.starts_with(&self.0) => Ok(file),
            Ok(_) => Err(OpenError::Leaves),
            // A device has no path.
            Err(_) => Err(OpenError::NotRegular),
        }
    }
}

/// The names in an open directory.
pub fn names(directory: &File) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(vramd_windows::final_path(directory)?)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// The same file for direct reads, where the file system takes those.
pub fn reopen_direct(file: &File) -> Option<File> {
    vramd_windows::reopen_direct(file).ok()
}

/// By which an open file is known again.
pub fn identity(file: &File) -> io::Result<FileIdentity> {
    let metadata = file.metadata()?;
    let (volume, file) = vramd_windows::file_number(file)?;
    Ok(FileIdentity {
        volume,
        file,
        bytes: metadata.len(),
        modified_nanoseconds: i128::from(metadata.last_write_time()) * 100,
    })
}

/// Reads at a place of a file.
pub fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    file.seek_read(into, offset)
}

/// Makes a directory; those of a user's profile are that user's alone.
pub fn make_private_directory(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)
}
