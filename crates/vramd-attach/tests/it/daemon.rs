//! The daemon's side of one connection, well-behaved or not.

use std::fs::read_to_string;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use vramd_api::attach::{Access, Acknowledge, Attach, FrameKind, HEADER_BYTES, Header, encode_frame};
use vramd_attach::Mapped;

pub const PAGE: u64 = 4096;
/// Where the block begins in its page, and how long it is: five pages, the first and the last in part.
pub const OFFSET: u64 = 256;
pub const BYTES: usize = 4 * PAGE as usize;

/// The daemon's end of a connection.
pub struct Daemon {
    pub stream: UnixStream,
    name: String,
}

/// Attaches to a daemon whose block has these bytes. Its segments are called `name`, which no other test may use.
pub fn attached(name: &str, access: Access, bytes: &[u8]) -> (Mapped, Daemon) {
    let place = tempfile::tempdir().expect("a directory");
    let socket = place.path().join("vramd.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::scope(|scope| {
        let mapped =
            scope.spawn(|| Mapped::attach(&socket, &Attach { access, moves: true, ..Attach::default() }));
        let mut daemon = Daemon { stream: listener.accept().expect("a client").0, name: name.to_owned() };
        let asked: Attach = daemon.receive(FrameKind::Attach);
        assert!(asked.moves, "it follows moves");
        let body = json!({
            "leaseId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f",
            "deviceId": "cpu:0",
            "allocationId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e60",
            "generation": 1,
            "access": access,
            "segments": [{"bytes": 8 * PAGE, "pageBytes": PAGE}],
            "block": {"segment": 0, "offset": OFFSET, "bytes": BYTES},
            "tensors": [["a", "U8", [16], 0, 16]],
        });
        let segment = daemon.segment(0, bytes);
        daemon.send(FrameKind::Attached, &body, &[segment.as_fd()]);
        (mapped.join().expect("no panic").expect("attached"), daemon)
    })
}

/// A move to the page of that number.
pub fn moved(generation: u64, page: u64) -> Value {
    json!({
        "generation": generation,
        "deviceId": "cpu:0",
        "segments": [{"bytes": 8 * PAGE, "pageBytes": PAGE}],
        "block": {"segment": 0, "offset": page * PAGE + OFFSET, "bytes": BYTES},
    })
}

impl Daemon {
    /// A segment of eight pages, with these bytes where the block begins in that page.
    pub fn segment(&self, page: u64, bytes: &[u8]) -> std::fs::File {
        let file: std::fs::File = memfd_create(&self.name, MemfdFlags::CLOEXEC).expect("a memfd").into();
        file.set_len(8 * PAGE).expect("its length");
        file.write_all_at(bytes, page * PAGE + OFFSET).expect("written");
        file
    }

    pub fn send(&self, kind: FrameKind, body: &Value, descriptors: &[BorrowedFd<'_>]) {
        let count = u32::try_from(descriptors.len()).expect("few");
        self.send_bytes(&encode_frame(kind, body, count).expect("a frame"), descriptors);
    }

    pub fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty());
        assert_eq!(sent.expect("sent"), bytes.len());
    }

    pub fn acknowledged(&mut self) -> Acknowledge {
        self.receive(FrameKind::Acknowledge)
    }

    /// The client has not closed.
    pub fn is_open(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("set");
        let read = self.stream.read(&mut [0]);
        self.stream.set_nonblocking(false).expect("set");
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Waits until the client has closed; what it said before that is not looked at.
    pub fn closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }

    fn receive<T: serde::de::DeserializeOwned>(&mut self, kind: FrameKind) -> T {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).expect("a header");
        let header = Header::decode(&header).expect("a good one");
        assert_eq!(header.kind, kind);
        let mut body = vec![0; header.body_bytes as usize];
        self.stream.read_exact(&mut body).expect("a body");
        serde_json::from_slice(&body).expect("a good body")
    }

    /// The flags of each mapping of its segments in this process, in the words of `smaps`.
    pub fn mappings(&self) -> Vec<String> {
        let smaps = read_to_string("/proc/self/smaps").expect("read");
        let mut flags = Vec::new();
        let mut ours = false;
        for line in smaps.lines() {
            if line.contains("memfd:") || line.contains('/') {
                ours = line.contains(&format!("memfd:{} ", self.name));
            }
            if let Some(of_it) = line.strip_prefix("VmFlags:")
                && std::mem::take(&mut ours)
            {
                flags.push(of_it.to_owned());
            }
        }
        flags
    }

    /// How many descriptors of its segments are open in this process.
    pub fn descriptors(&self) -> usize {
        let name = format!("memfd:{} ", self.name);
        let open = std::fs::read_dir("/proc/self/fd").expect("read").filter_map(Result::ok);
        open.filter_map(|one| std::fs::read_link(one.path()).ok())
            .filter(|target| target.to_string_lossy().contains(&name))
            .count()
    }
}
