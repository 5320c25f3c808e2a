//! Listening: TCP for HTTP, one local socket for HTTP, attach frames and workers, told apart by their first byte.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use vramd_api::attach::MAGIC;
use vramd_api::{ApiError, ErrorCode, Failure, Holder};

use crate::attach;
use crate::driver::{Caller, Driver, Event, Joining};
use crate::http::{self, Peer};
use crate::platform::{self, LocalListener, LocalStream};
use crate::workers;

/// The most connections over TCP, as many over the local socket, and the most attached ones, at one time.
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
    local: Arc<Semaphore>,
    attached: Arc<Semaphore>,
    stopping: CancellationToken,
}

impl Server {
    pub fn new(service: http::Service, driver: Driver, stopping: CancellationToken) -> Self {
        Self {
            service: Arc::new(service),
            driver,
            tcp: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            local: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            attached: Arc::new(Semaphore::new(MAX_ATTACHED)),
            stopping,
        }
    }

    /// Accepts until the daemon stops, then lets answers under way end.
    pub async fn run(self, tcp: Option<TcpListener>, mut local: Option<LocalListener>) {
        let server = Arc::new(self);
        let graceful = GracefulShutdown::new();
        loop {
            let accepted = tokio::select! {
                accepted = accept_tcp(tcp.as_ref()) => accepted.map(Accepted::Tcp),
                accepted = accept_local(local.as_mut()) => accepted.map(Accepted::Local),
                () = server.stopping.cancelled() => break,
            };
            match accepted {
                Ok(Accepted::Tcp(stream)) => {
                    let _ = stream.set_nodelay(true);
                    let watcher = graceful.watcher();
                    tokio::spawn(server.clone().tcp(stream, watcher));
                }
                Ok(Accepted::Local(stream)) => {
                    tokio::spawn(server.clone().local(stream, graceful.watcher()));
                }
                Err(error) => {
                    // Out of descriptors, most likely: let some close before the next try.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        drop((tcp, local));
        let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
    }

    async fn tcp(self: Arc<Self>, mut stream: TcpStream, watcher: Watcher) {
        match self.tcp.clone().try_acquire_owned() {
            Ok(_place) => self.http(stream, Caller { uid: None }, watcher).await,
            Err(_) => refuse(&mut stream).await,
        }
    }

    async fn local(self: Arc<Self>, mut stream: LocalStream, watcher: Watcher) {
        let Ok((pid, uid)) = stream.peer() else { return };
        let Ok(place) = self.local.clone().try_acquire_owned() else { return refuse(&mut stream).await };
        let first = tokio::time::timeout(HEADER_TIMEOUT, stream.peek()).await;
        match first {
            Ok(Ok(Some(first))) if first == MAGIC[0] => {
                drop((place, watcher));
                let holder = Holder { pid, uid, command: platform::command(pid) };
                self.attach(stream, holder).await;
            }
            Ok(Ok(Some(b'{'))) => {
                drop(watcher);
                self.worker(stream, pid, uid, place).await;
            }
            Ok(Ok(Some(_))) => self.http(stream, Caller { uid: Some(uid) }, watcher).await,
            Ok(Ok(None) | Err(_)) | Err(_) => {}
        }
    }

    async fn attach(&self, mut stream: LocalStream, holder: Holder) {
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

    /// A worker that somebody else started joins; once it is one of the driver's, that ends it.
    async fn worker(&self, stream: LocalStream, pid: u32, uid: u32, place: OwnedSemaphorePermit) {
        let Some(joined) = workers::join(stream).await else { return };
        let asked = async {
            let device =
                joined.join.device_id.as_ref().map(|name| self.driver.devices.id(name)).transpose()?;
            // One of another container has no number here.
            let pid = (pid != 0).then_some(pid);
            let joining = Joining { name: joined.join.name.clone(), device, pid, uid };
            self.driver.ask(|reply| Event::JoinWorker(Box::new(joining), reply)).await
        };
        let asked = asked.await;
        drop(place);
        match asked {
            Ok(task) => workers::host(task, joined).await,
            Err(error) => joined.refuse(&error).await,
        }
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
    Local(LocalStream),
}

async fn accept_tcp(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

async fn accept_local(listener: Option<&mut LocalListener>) -> io::Result<LocalStream> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
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

/// Removes a file when it is dropped: a socket, a ready file.
#[derive(Debug)]
pub struct RemoveOnDrop(pub PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
