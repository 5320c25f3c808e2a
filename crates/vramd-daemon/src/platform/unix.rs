//! A Unix socket, `/proc`, and `openat2`.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::Pid;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use vramd_core::models::FileIdentity;
use vramd_device::Descriptor;

use super::OpenError;

/// More processes than this are not looked for in one family.
const MOST_DESCENDANTS: usize = 1024;

/// The user that this process runs as.
pub fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Whether a process has not ended. One that only its parent has not heard of has.
pub fn lives(pid: u32) -> bool {
    let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let is_there = id.is_some_and(|id| rustix::process::test_kill_process(id) != Err(Errno::SRCH));
    // Its name, in brackets, may hold anything.
    let state = |stat: String| Some(stat.rsplit_once(") ")?.1.starts_with(['Z', 'X']));
    is_there && !std::fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(state).unwrap_or(false)
}

/// The user that a process runs as.
pub fn uid_of(pid: u32) -> Option<u32> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(format!("/proc/{pid}")).ok().map(|it| it.uid())
}

/// A process and all that it started, and those started; not this one, whoever started it.
pub fn with_descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(pid) = all.get(next).filter(|_| all.len() < MOST_DESCENDANTS) {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let children =
            |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children")).ok();
        let children: String = threads.filter_map(children).collect();
        let children = children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok());
        all.extend(children.filter(|pid| *pid != std::process::id()));
        next += 1;
    }
    all
}

/// What a process calls itself.
pub fn command(pid: u32) -> String {
    let read = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    let printable = |name: String| name.trim_end().replace(char::is_control, "?");
    read.map_or_else(|_| "?".to_owned(), printable)
}

/// The local socket.
#[derive(Debug)]
pub struct LocalListener(UnixListener);

/// A connection to it.
#[derive(Debug)]
pub struct LocalStream(UnixStream);

impl LocalListener {
    /// Binds the Unix socket. One that a dead daemon left is replaced; one that is served is not.
    pub fn bind(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            std::fs::create_dir_all(directory)?;
            // Who owns the directory decides who serves on the socket.
            let owner = std::fs::metadata(directory)?.uid();
            if owner != 0 && owner != own_uid() {
                let text = format!("the directory {} belongs to another user", directory.display());
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves on it")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        Ok(Self(listener))
    }

    pub async fn accept(&mut self) -> io::Result<LocalStream> {
        self.0.accept().await.map(|(stream, _)| LocalStream(stream))
    }
}

impl LocalStream {
    /// The process at the other end, and its user.
    pub fn peer(&self) -> io::Result<(u32, u32)> {
        let peer = self.0.peer_cred()?;
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        Ok((pid, peer.uid()))
    }

    /// The first byte, left where it is; None when the connection ended before.
    pub async fn peek(&mut self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        let receive = || Ok(rustix::net::recv(&self.0, &mut byte, RecvFlags::PEEK)?);
        let (got, _) = self.0.async_io(Interest::READABLE, receive).await?;
        Ok((got > 0).then_some(byte[0]))
    }

    /// Sends the beginning of a frame with its descriptor; answers how many bytes went along.
    pub async fn send_with(&mut self, frame: &[u8], descriptor: &Descriptor) -> io::Result<usize> {
        let stream = &self.0;
        stream
            .async_io(Interest::WRITABLE, || {
                let descriptors = [descriptor.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                let parts = [io::IoSlice::new(frame)];
                Ok(rustix::net::sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)?)
            })
            .await
    }
}

impl AsyncRead for LocalStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for LocalStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// A directory that files are opened beneath.
#[derive(Debug)]
pub struct Directory(File);

impl Directory {
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?.into()))
    }

    /// Opens a file or a directory for reading. Nothing leads out: no `..`, no symlink and no mount trick, not even when
    /// the tree changes between two looks.
    pub fn open_beneath(&self, below: &Path) -> Result<File, OpenError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        // A pipe that nobody writes to would be waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        match rustix::fs::openat2(self.0.as_fd(), below, flags, Mode::empty(), resolve) {
            Ok(file) => Ok(file.into()),
            Err(Errno::XDEV) => Err(OpenError::Leaves),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(OpenError::NotThere),
            Err(Errno::ACCESS | Errno::PERM) => Err(OpenError::Denied),
            // A socket cannot be opened at all.
            Err(Errno::NXIO) => Err(OpenError::NotRegular),
            Err(Errno::LOOP | Errno::NAMETOOLONG) => Err(OpenError::Unfollowable),
            Err(error) => Err(OpenError::Failed(error.into())),
        }
    }
}

/// The names in an open directory.
pub fn names(directory: &File) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// The same file, not the same path, for direct reads, where the file system takes those.
pub fn reopen_direct(file: &File) -> Option<File> {
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(same, flags, Mode::empty()).ok().map(File::from)
}

/// By which an open file is known again.
pub fn identity(file: &File) -> io::Result<FileIdentity> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = file.metadata()?;
    Ok(FileIdentity {
        volume: metadata.dev(),
        file: metadata.ino(),
        bytes: metadata.len(),
        modified_nanoseconds: i128::from(metadata.mtime()) * 1_000_000_000
            + i128::from(metadata.mtime_nsec()),
    })
}

/// Reads at a place of a file.
pub fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, offset)
}

/// Makes a directory that is this user's alone.
pub fn make_private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
