//! A named pipe; handles come opened in this process, and their values travel behind the header.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::windows::io::{AsRawHandle as _, FromRawHandle as _, OwnedHandle};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use std::os::windows::io::OwnedHandle as Descriptor;

use vramd_api::attach::{DESCRIPTOR_BYTES, HEADER_BYTES, Header};
use vramd_windows::{is_trusted, system};
use windows::Win32::Foundation::{
    ERROR_BROKEN_PIPE, ERROR_IO_PENDING, ERROR_PIPE_BUSY, ERROR_PIPE_NOT_CONNECTED, GENERIC_READ,
    GENERIC_WRITE, HANDLE, WAIT_OBJECT_0, WAIT_TIMEOUT, WIN32_ERROR,
};
use windows::Win32::Storage::FileSystem::{
    CreateFileW, FILE_FLAG_OVERLAPPED, FILE_SHARE_NONE, OPEN_EXISTING, ReadFile, SECURITY_IDENTIFICATION,
    SECURITY_SQOS_PRESENT, WriteFile,
};
use windows::Win32::System::IO::{CancelIoEx, GetOverlappedResult, OVERLAPPED};
use windows::Win32::System::Pipes::WaitNamedPipeW;
use windows::Win32::System::Threading::{CreateEventW, INFINITE, SetEvent, WaitForMultipleObjects};
use windows::core::{HSTRING, PCWSTR};

use crate::AttachError;

/// How long a daemon may take to be ready for one more client.
const BUSY_MS: u32 = 5_000;

/// Where the daemon's pipe is when nobody says otherwise: each user has one.
pub fn default_socket() -> PathBuf {
    let user = std::env::var("USERNAME").unwrap_or_else(|_| "local".to_owned());
    format!(r"\\.\pipe\vramd-{user}").into()
}

/// The client's end of the daemon's pipe. Another thread can end what waits on it.
#[derive(Debug)]
pub struct Stream {
    pipe: OwnedHandle,
    stopped: Arc<OwnedHandle>,
    /// For reads, in milliseconds.
    patience: AtomicU32,
}

/// Ends what waits on a connection, from another thread. It holds no end of the pipe: a name is in use for as long as one
/// does, and the next daemon could not take it.
#[derive(Debug)]
pub struct Stopper(Arc<OwnedHandle>);

impl Stopper {
    #[allow(clippy::unnecessary_wraps, reason = "as elsewhere")]
    pub fn of(stream: &Stream) -> io::Result<Self> {
        Ok(Self(stream.stopped.clone()))
    }

    pub fn stop(&self) {
        // SAFETY: the handle lives. It fails for none that does.
        let _ = unsafe { SetEvent(raw(&self.0)) };
    }
}

impl Stream {
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let name = HSTRING::from(path.as_ref());
        let name = PCWSTR(name.as_ptr());
        // Whoever serves there learns who we are, and may not act in our name.
        let flags = FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_IDENTIFICATION;
        let rights = GENERIC_READ.0 | GENERIC_WRITE.0;
        loop {
            // SAFETY: the name ends with a zero; the handle that comes is ours.
            let opened =
                unsafe { CreateFileW(name, rights, FILE_SHARE_NONE, None, OPEN_EXISTING, flags, None) };
            match opened {
                Ok(pipe) => {
                    // SAFETY: as above.
                    let pipe = unsafe { OwnedHandle::from_raw_handle(pipe.0) };
                    if !is_trusted(&pipe)? {
                        let text = "another user serves there";
                        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
                    }
                    return Ok(Self {
                        pipe,
                        stopped: Arc::new(event()?),
                        patience: AtomicU32::new(INFINITE),
                    });
                }
                Err(error) if WIN32_ERROR::from_error(&error) == Some(ERROR_PIPE_BUSY) => {
                    // SAFETY: the name ends with a zero.
                    if !unsafe { WaitNamedPipeW(name, BUSY_MS) }.as_bool() {
                        return Err(io::Error::last_os_error());
                    }
                }
                Err(error) => return Err(system(error)),
            }
        }
    }

    #[allow(clippy::unnecessary_wraps, reason = "as elsewhere")]
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        let patience = timeout.map_or(INFINITE, |timeout| timeout.as_millis().try_into().unwrap_or(INFINITE));
        self.patience.store(patience, Ordering::Relaxed);
        Ok(())
    }

    /// Ends every read, now and later.
    pub fn shutdown(&self, _how: Shutdown) -> io::Result<()> {
        // SAFETY: the handle lives.
        unsafe { SetEvent(raw(&self.stopped)) }.map_err(system)
    }

    /// Starts a transfer and waits for its end; how many bytes went, 0 at the end of the stream.
    fn transfer(
        &self,
        patience: u32,
        start: impl FnOnce(HANDLE, *mut OVERLAPPED) -> windows::core::Result<()>,
    ) -> io::Result<usize> {
        let done = event()?;
        let mut overlapped = OVERLAPPED { hEvent: raw(&done), ..OVERLAPPED::default() };
        let pipe = raw(&self.pipe);
        if let Err(error) = start(pipe, &raw mut overlapped) {
            match WIN32_ERROR::from_error(&error) {
                Some(ERROR_IO_PENDING) => {}
                Some(ERROR_BROKEN_PIPE | ERROR_PIPE_NOT_CONNECTED) => return Ok(0),
                _ => return Err(system(error)),
            }
        }
        let mut bytes = 0;
        // SAFETY: all handles live, and `overlapped` and what the transfer is from or to do until the last call has seen
        // its end, whether it was cancelled or not.
        let (waited, ended) = unsafe {
            let waited = WaitForMultipleObjects(&[raw(&done), raw(&self.stopped)], false, patience);
            if waited != WAIT_OBJECT_0 {
                let _ = CancelIoEx(pipe, Some(&raw const overlapped));
            }
            (waited, GetOverlappedResult(pipe, &raw const overlapped, &raw mut bytes, true))
        };
        match ended {
            Ok(()) => Ok(bytes as usize),
            Err(_) if waited == WAIT_TIMEOUT => Err(io::ErrorKind::TimedOut.into()),
            // Stopped from here.
            Err(_) if waited != WAIT_OBJECT_0 => Ok(0),
            Err(error) => match WIN32_ERROR::from_error(&error) {
                Some(ERROR_BROKEN_PIPE | ERROR_PIPE_NOT_CONNECTED) => Ok(0),
                _ => Err(system(error)),
            },
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (&*self).read(into)
    }
}

impl Read for &Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.transfer(self.patience.load(Ordering::Relaxed), |pipe, overlapped| {
            // SAFETY: `transfer` waits for the end, and until then nobody else has `into`.
            unsafe { ReadFile(pipe, Some(into), None, Some(overlapped)) }
        })
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.transfer(INFINITE, |pipe, overlapped| {
            // SAFETY: `transfer` waits for the end.
            unsafe { WriteFile(pipe, Some(from), None, Some(overlapped)) }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads exactly one header and the handles behind it; none is ever dropped on the way.
pub fn receive_header(mut stream: &Stream) -> Result<(Header, Vec<Descriptor>, bool), AttachError> {
    let mut bytes = [0; HEADER_BYTES];
    stream.read_exact(&mut bytes)?;
    let header = Header::decode(&bytes)?;
    let mut values = vec![0; header.descriptors as usize * DESCRIPTOR_BYTES];
    stream.read_exact(&mut values)?;
    let handles = values.as_chunks::<DESCRIPTOR_BYTES>().0.iter().map(|value| {
        // SAFETY: a daemon that is trusted (`connect`) opened it in this process for us, and tells nobody else.
        unsafe { OwnedHandle::from_raw_handle(usize::from_le_bytes(*value) as *mut _) }
    });
    Ok((header, handles.collect(), false))
}

/// A file mapping does not say how long it is: mapping more of it than there is fails.
#[allow(clippy::unnecessary_wraps, reason = "elsewhere it can be asked for")]
pub fn length(_handle: &Descriptor) -> io::Result<u64> {
    Ok(u64::MAX)
}

fn event() -> io::Result<OwnedHandle> {
    // SAFETY: no pointer is passed; the handle that comes is ours.
    unsafe {
        let event = CreateEventW(None, true, false, PCWSTR::null()).map_err(system)?;
        Ok(OwnedHandle::from_raw_handle(event.0))
    }
}

fn raw(handle: &OwnedHandle) -> HANDLE {
    HANDLE(handle.as_raw_handle())
}
