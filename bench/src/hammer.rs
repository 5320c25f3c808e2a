//! Connections that each send a request, wait for its answer, and send the next.
//!
//! It reads HTTP only as far as the servers here write it: one answer at a time, with a Content-Length.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const BODY: &str = r#"{"sizeBytes":65536,"allocationType":"Buffer","purpose":"scratch","leaseSeconds":60}"#;

/// Asks for `seconds` and answers with a JSON object: requests, their rate, p50 and p99 in microseconds.
pub async fn run(
    address: SocketAddr,
    connections: usize,
    seconds: f64,
    allocate_on: Option<&str>,
) -> anyhow::Result<serde_json::Value> {
    let mut opened = Vec::with_capacity(connections);
    for _ in 0..connections {
        opened.push(Connection::open(address).await?);
    }
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(seconds);
    let tasks: Vec<_> = opened
        .into_iter()
        .map(|mut connection| {
            let device = allocate_on.map(ToOwned::to_owned);
            tokio::spawn(async move {
                match device {
                    Some(device) => connection.allocate(&device, end).await?,
                    None => connection.status(end).await?,
                }
                anyhow::Ok(connection.micros)
            })
        })
        .collect();
    let mut micros = Vec::new();
    for task in tasks {
        micros.extend(task.await??);
    }
    let elapsed = begin.elapsed().as_secs_f64();
    ensure!(!micros.is_empty(), "no request was answered");
    micros.sort_unstable();
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share) as usize];
    Ok(serde_json::json!({
        "requests": micros.len(), "perSecond": micros.len() as f64 / elapsed,
        "p50Micros": at(0.5), "p99Micros": at(0.99),
    }))
}

struct Connection {
    stream: TcpStream,
    host: String,
    received: Vec<u8>,
    micros: Vec<u32>,
}

impl Connection {
    async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, host: address.to_string(), received: Vec::new(), micros: Vec::new() })
    }

    async fn status(&mut self, end: Instant) -> anyhow::Result<()> {
        let request = self.request("GET", "/api/memory/status", "");
        while Instant::now() < end {
            self.ask(&request).await?;
        }
        Ok(())
    }

    async fn allocate(&mut self, device: &str, end: Instant) -> anyhow::Result<()> {
        let allocate = self.request("POST", &format!("/api/memory/allocations/allocate/{device}"), BODY);
        while Instant::now() < end {
            let id = allocation_id(self.ask(&allocate).await?)?.to_owned();
            let release = self.request("DELETE", &format!("/api/memory/allocations/{id}"), "");
            self.ask(&release).await?;
        }
        Ok(())
    }

    fn request(&self, method: &str, path: &str, body: &str) -> String {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host);
        if body.is_empty() {
            return head + "\r\n";
        }
        let length = body.len();
        format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
    }

    /// Sends a request and answers with the body of its answer.
    async fn ask(&mut self, request: &str) -> anyhow::Result<&str> {
        let begin = Instant::now();
        self.stream.write_all(request.as_bytes()).await?;
        self.received.clear();
        let (head, length) = loop {
            ensure!(self.stream.read_buf(&mut self.received).await? > 0, "the server closed the connection");
            if let Some(head) = self.received.windows(4).position(|end| end == b"\r\n\r\n") {
                break (head, content_length(&self.received[..head])?);
            }
        };
        let end = head + 4 + length;
        while self.received.len() < end {
            ensure!(self.stream.read_buf(&mut self.received).await? > 0, "the server closed the connection");
        }
        self.micros.push(u32::try_from(begin.elapsed().as_micros())?);
        let text = std::str::from_utf8(&self.received)?;
        if !text.starts_with("HTTP/1.1 2") {
            bail!("the server answered {text}");
        }
        Ok(&text[head + 4..])
    }
}

fn content_length(head: &[u8]) -> anyhow::Result<usize> {
    std::str::from_utf8(head)?
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .and_then(|length| length.parse().ok())
        .context("the answer has no Content-Length")
}

fn allocation_id(body: &str) -> anyhow::Result<&str> {
    let (_, rest) = body.split_once(r#""allocationId":""#).context("the answer names no allocation")?;
    Ok(rest.split('"').next().unwrap_or_default())
}
