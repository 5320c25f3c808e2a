//! Listening: TCP for HTTP, one Unix socket for HTTP and attach frames, told apart by their first byte.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use vramd_api::attach::MAGIC;
use vramd_api::{ApiError, ErrorCode, Failure, Holder};

use crate::attach;
use crate::driver::{Caller, Driver};
use crate::http::{self, Peer};

/// The most connections over TCP, as many over the Unix socket, and the most attached ones, at one time.
const MAX_CONNECTIONS: usize = 1024;
const MAX_ATTACHED: usize = 16_384;
/// A client that connects and says nothing is closed after this.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long answers under way may take once the daemon stops.
const GRACE: Duration = Duration::from_secs(2);

/// What listens, and what it shares.
#[derive(Debug)]
pub struct Server {
    service: Arc<http::Service>,
    driver: Driver,
    /// Places for HTTP, and for what has not said yet what it is.
    tcp: Arc<Semaphore>,
    unix: Arc<Semaphore>,
    attached: Arc<Semaphore>,
    stopping: CancellationToken,
}

impl Server {
    pub fn new(service: http::Service, driver: Driver, stopping: CancellationToken) -> Self {
        Self {
            service: Arc::new(service),
            driver,
            tcp: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            unix: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            attached: Arc::new(Semaphore::new(MAX_ATTACHED)),
            stopping,
        }
    }

    /// Accepts until the daemon stops, then lets answers under way end.
    pub async fn run(self, tcp: Option<TcpListener>, unix: Option<UnixListener>) {
        let server = Arc::new(self);
        let graceful = GracefulShutdown::new();
        loop {
            let accepted = tokio::select! {
                accepted = accept_tcp(tcp.as_ref()) => accepted.map(Accepted::Tcp),
                accepted = accept_unix(unix.as_ref()) => accepted.map(Accepted::Unix),
                () = server.stopping.cancelled() => break,
            };
            match accepted {
                Ok(Accepted::Tcp(stream)) => {
                    let _ = stream.set_nodelay(true);
                    let watcher = graceful.watcher();
                    tokio::spawn(server.clone().tcp(stream, watcher));
                }
                Ok(Accepted::Unix(stream)) => {
                    tokio::spawn(server.clone().unix(stream, graceful.watcher()));
                }
                Err(error) => {
                    // Out of descriptors, most likely: let some close before the next try.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        drop((tcp, unix));
        let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
    }

    async fn tcp(self: Arc<Self>, mut stream: TcpStream, watcher: Watcher) {
        match self.tcp.clone().try_acquire_owned() {
            Ok(_place) => self.http(stream, Caller { uid: None }, watcher).await,
            Err(_) => refuse(&mut stream).await,
        }
    }

    async fn unix(self: Arc<Self>, mut stream: UnixStream, watcher: Watcher) {
        let Ok(peer) = stream.peer_cred() else { return };
        let Ok(place) = self.unix.clone().try_acquire_owned() else { return refuse(&mut stream).await };
        let first = tokio::time::timeout(HEADER_TIMEOUT, peek(&stream)).await;
        match first {
            Ok(Ok(Some(first))) if first == MAGIC[0] => {
                drop((place, watcher));
                let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
                let holder = Holder { pid, uid: peer.uid(), command: command(pid) };
                self.attach(stream, holder).await;
            }
            Ok(Ok(Some(_))) => self.http(stream, Caller { uid: Some(peer.uid()) }, watcher).await,
            Ok(Ok(None) | Err(_)) | Err(_) => {}
        }
    }

    async fn attach(&self, mut stream: UnixStream, holder: Holder) {
        let Ok(_place) = self.attached.try_acquire() else {
            let error =
                ApiError::new(ErrorCode::TooManyRequests, format!("{MAX_ATTACHED} connections are attached"))
                    .hint("close some of them, then try again")
                    .detail("limit", MAX_ATTACHED);
            let frame = vramd_api::attach::encode_frame(vramd_api::attach::FrameKind::Error, &error, 0);
            let _ = stream.write_all(&frame.expect("an error is plain data")).await;
            return;
        };
        attach::serve(stream, self.driver.clone(), holder, self.stopping.clone()).await;
    }

    async fn http<S>(&self, stream: S, caller: Caller, watcher: Watcher)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = self.service.clone();
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(caller));
            let service = service.clone();
            async move { Ok::<_, Infallible>(service.answer(request.map(Body::new)).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        // A client that breaks its connection is no event of ours.
        let _ = watcher.watch(connection).await;
    }
}

enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

async fn accept_tcp(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

async fn accept_unix(listener: Option<&UnixListener>) -> io::Result<UnixStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

/// The first byte of a connection, left where it is; None when it ended before.
async fn peek(stream: &UnixStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    let (got, _) = stream
        .async_io(Interest::READABLE, || Ok(rustix::net::recv(stream, &mut byte, RecvFlags::PEEK)?))
        .await?;
    Ok((got > 0).then_some(byte[0]))
}

/// Tells a connection beyond the limit so.
async fn refuse(stream: &mut (impl AsyncWrite + Unpin)) {
    let _ = tokio::time::timeout(GRACE, stream.write_all(full().as_bytes())).await;
    let _ = stream.shutdown().await;
}

fn full() -> String {
    let error =
        ApiError::new(ErrorCode::TooManyRequests, format!("{MAX_CONNECTIONS} connections are open already"))
            .hint("close some of them, then try again")
            .detail("limit", MAX_CONNECTIONS);
    let failure = Failure { success: false, request_id: uuid::Uuid::now_v7().to_string(), error };
    let body = serde_json::to_string(&failure).expect("an error is plain data");
    format!(
        "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// What a process calls itself.
pub fn command(pid: u32) -> String {
    let read = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    let printable = |name: String| name.trim_end().replace(char::is_control, "?");
    read.map_or_else(|_| "?".to_owned(), printable)
}

/// Binds the Unix socket. One that a dead daemon left is replaced; one that is served is not.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory)?;
        // Who owns the directory decides who serves on the socket.
        let owner = std::fs::metadata(directory)?.uid();
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
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
    Ok(listener)
}

/// Removes a file when it is dropped: a socket, a ready file.
#[derive(Debug)]
pub struct RemoveOnDrop(pub PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
