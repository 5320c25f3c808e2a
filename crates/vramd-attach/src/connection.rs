//! The connection: asks for a model or an allocation, gets descriptors and the tensor table, and then every move.
//!
//! Everything that the daemon says is checked here first: a range that passes lies inside a descriptor that is at least
//! as large as announced.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use vramd_api::ApiError;
use vramd_api::attach::{
    Acknowledge, Attach, Attached, AttachedBlock, AttachedSegment, BadHeader, FrameKind, Handle, Header,
    Moved, Tensor, encode_frame,
};

use crate::stream::{Descriptor, Stream, length, receive_header};

/// A daemon that does not answer an attach in this time hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What was attached. Dropping it ends the lease; mappings made from its descriptors stay valid in this process.
#[derive(Debug)]
pub struct Attachment {
    /// With the place that was accepted last.
    pub attached: Attached,
    pub tensors: Vec<Tensor>,
    /// One for each of `attached.segments`.
    pub descriptors: Vec<Descriptor>,
    /// The lease. It reads as ended when the daemon goes; shutting it down ends a [`next_move`](Self::next_move).
    pub stream: Stream,
}

/// Where the daemon has moved the bytes of an attachment.
#[derive(Debug)]
pub struct Place {
    pub moved: Moved,
    /// One for each of `moved.segments`.
    pub descriptors: Vec<Descriptor>,
}

impl Attachment {
    /// Blocks until the bytes have another place, which has to be accepted or declined; `None` once the connection has
    /// ended. Only a request with `moves` is ever told of one. What cannot be used is declined here.
    ///
    /// After an error nothing more can be read, but the bytes are safe for as long as the connection is open.
    pub fn next_move(&mut self) -> Result<Option<Place>, AttachError> {
        loop {
            let (header, descriptors, dropped) = match receive_header(&self.stream) {
                Err(AttachError::Broken(error)) if is_end(&error) => return Ok(None),
                other => other?,
            };
            if header.kind != FrameKind::Moved {
                return Err(AttachError::Frame("only a move has a place here".to_owned()));
            }
            let moved: Moved = receive_body(&mut self.stream, &header)?;
            let usable = all_came(dropped)
                .and_then(|()| check_place(&moved.segments, &moved.block, header.descriptors, &descriptors))
                .and_then(|()| check_move(&self.attached, &moved));
            let place = Place { moved, descriptors };
            match usable {
                Ok(()) => return Ok(Some(place)),
                Err(error) => self.decline(&place, error.to_string())?,
            }
        }
    }

    /// Says that the old place is mapped nowhere in this process any more. The daemon may then give it to others.
    pub fn accept(&mut self, place: Place) -> Result<(), AttachError> {
        let Moved { generation, device_id, segments, block } = place.moved;
        self.attached.device_id = device_id;
        self.attached.generation = generation;
        self.attached.segments = segments;
        self.attached.block = block;
        self.descriptors = place.descriptors;
        self.answer(&Acknowledge { generation, moved: true, reason: None })
    }

    /// Says that this process keeps the old place, and why. The daemon holds it until the connection ends.
    pub fn decline(&mut self, place: &Place, reason: String) -> Result<(), AttachError> {
        let generation = place.moved.generation;
        self.answer(&Acknowledge { generation, moved: false, reason: Some(reason) })
    }

    fn answer(&mut self, answer: &Acknowledge) -> Result<(), AttachError> {
        Ok(self.stream.write_all(&encode_frame(FrameKind::Acknowledge, answer, 0)?)?)
    }
}

/// The daemon went, or this side shut the connection down.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("{0}")]
    Api(Box<ApiError>),
    #[error("no vramd answers at {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("the attach connection broke")]
    Broken(#[from] io::Error),
    #[error("the daemon sent a frame that cannot be used: {0}")]
    Frame(String),
}

impl From<BadHeader> for AttachError {
    fn from(error: BadHeader) -> Self {
        Self::Frame(error.to_string())
    }
}

impl From<serde_json::Error> for AttachError {
    fn from(error: serde_json::Error) -> Self {
        Self::Frame(error.to_string())
    }
}

impl AttachError {
    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Api(error) => error.hint.clone(),
            Self::Connect { .. } => Some(
                "is it running? `vramd serve` starts it; --socket or VRAMD_SOCKET names another path"
                    .to_owned(),
            ),
            Self::Broken(_) => Some("the daemon may have stopped: look at its log".to_owned()),
            Self::Frame(_) => Some("compare `vramd --version` with the version of the daemon".to_owned()),
        }
    }
}

/// Attaches what `request` names. Blocks until the daemon answers.
pub fn attach(socket: &Path, request: &Attach) -> Result<Attachment, AttachError> {
    let stream = Stream::connect(socket)
        .map_err(|source| AttachError::Connect { socket: socket.to_owned(), source })?;
    attach_over(stream, request)
}

pub(crate) fn attach_over(mut stream: Stream, request: &Attach) -> Result<Attachment, AttachError> {
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(&encode_frame(FrameKind::Attach, request, 0)?)?;
    let (header, descriptors, dropped) = receive_header(&stream)?;
    all_came(dropped)?;
    match header.kind {
        FrameKind::Attached => {
            let attached: Attached = receive_body(&mut stream, &header)?;
            let tensors = attached.tensors()?;
            check_place(&attached.segments, &attached.block, header.descriptors, &descriptors)?;
            check_handles(&attached.segments, |handle| request.takes(handle.kind()))?;
            check_tensors(&attached, &tensors)?;
            stream.set_read_timeout(None)?;
            Ok(Attachment { attached, tensors, descriptors, stream })
        }
        FrameKind::Error => Err(AttachError::Api(Box::new(receive_body(&mut stream, &header)?))),
        FrameKind::Attach | FrameKind::Moved | FrameKind::Acknowledge => {
            Err(AttachError::Frame("it is no answer to a request".to_owned()))
        }
    }
}

fn all_came(dropped: bool) -> Result<(), AttachError> {
    if dropped {
        return bad("the kernel dropped some of its descriptors: this process has too many open (ulimit -n)");
    }
    Ok(())
}

fn receive_body<T: DeserializeOwned>(stream: &mut Stream, header: &Header) -> Result<T, AttachError> {
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

fn bad(what: impl Into<String>) -> Result<(), AttachError> {
    Err(AttachError::Frame(what.into()))
}

fn check_place(
    segments: &[AttachedSegment],
    block: &AttachedBlock,
    announced: u32,
    descriptors: &[Descriptor],
) -> Result<(), AttachError> {
    if descriptors.len() != announced as usize || descriptors.len() != segments.len() {
        return bad(format!(
            "{} descriptors came for {} segments, and {announced} were announced",
            descriptors.len(),
            segments.len()
        ));
    }
    for (number, (segment, descriptor)) in segments.iter().zip(descriptors).enumerate() {
        if !segment.page_bytes.is_power_of_two() || !segment.bytes.is_multiple_of(segment.page_bytes) {
            return bad(format!("segment {number} is no multiple of its pages"));
        }
        // Nothing else has a length that can be asked for.
        if segment.handle != Handle::Memfd {
            continue;
        }
        let bytes = length(descriptor)?;
        if bytes < segment.bytes {
            return bad(format!("segment {number} has {bytes} bytes and should have {}", segment.bytes));
        }
    }
    let Some(segment) = segments.get(block.segment as usize) else {
        return bad(format!("there is no segment {}", block.segment));
    };
    if inside(block.offset, block.bytes, segment.bytes) {
        Ok(())
    } else {
        bad("the block lies outside its segment")
    }
}

fn check_handles(segments: &[AttachedSegment], fits: impl Fn(&Handle) -> bool) -> Result<(), AttachError> {
    match segments.iter().find(|segment| !fits(&segment.handle)) {
        Some(segment) => bad(format!("a descriptor of kind {:?} was not asked for", segment.handle.kind())),
        None => Ok(()),
    }
}

/// What has to hold for the new pages to be mapped over the old ones.
fn check_move(attached: &Attached, moved: &Moved) -> Result<(), AttachError> {
    let before = attached.segments.first().map(|segment| segment.handle.kind());
    check_handles(&moved.segments, |handle| Some(handle.kind()) == before)?;
    let page_bytes = |segments: &[AttachedSegment], block: &AttachedBlock| {
        segments.get(block.segment as usize).map_or(1, |segment| segment.page_bytes)
    };
    let page = page_bytes(&attached.segments, &attached.block);
    if moved.generation <= attached.generation {
        return bad(format!("generation {} comes after {}", moved.generation, attached.generation));
    }
    if page_bytes(&moved.segments, &moved.block) != page {
        return bad("the new place has other pages");
    }
    if moved.block.bytes != attached.block.bytes {
        return bad("the new place has another size");
    }
    if moved.block.offset % page != attached.block.offset % page {
        return bad("the new place begins elsewhere in its page");
    }
    Ok(())
}

fn check_tensors(attached: &Attached, tensors: &[Tensor]) -> Result<(), AttachError> {
    for tensor in tensors {
        if !inside(tensor.offset, tensor.bytes, attached.block.bytes) {
            return bad(format!("tensor {} lies outside the block", tensor.name));
        }
        if tensor.dtype.bytes(&tensor.shape) != Some(tensor.bytes) {
            return bad(format!("tensor {} has a size that is not that of its shape", tensor.name));
        }
    }
    Ok(())
}

fn inside(offset: u64, bytes: u64, whole: u64) -> bool {
    offset.checked_add(bytes).is_some_and(|end| end <= whole)
}

#[cfg(all(test, unix))]
mod tests {
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use serde_json::{Value, json};

    use vramd_api::ErrorCode;
    use vramd_api::attach::{HEADER_BYTES, MAX_DESCRIPTORS};

    use super::*;

    const PAGE: u64 = 4096;

    fn memory(bytes: u64) -> OwnedFd {
        let descriptor = memfd_create("test", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&descriptor, bytes).expect("its length");
        descriptor
    }

    fn answer() -> Value {
        json!({
            "leaseId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f",
            "deviceId": "cpu:0",
            "allocationId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e60",
            "generation": 1,
            "model": "tiny",
            "component": "weights",
            "access": "read",
            "segments": [{"bytes": PAGE, "pageBytes": PAGE}],
            "block": {"segment": 0, "offset": 256, "bytes": 64},
            "tensors": [["a", "F32", [2, 3], 0, 24], ["b", "F4", [4], 24, 2], ["c", "BF16", [], 26, 2]],
            "metadata": {"format": "pt"},
        })
    }

    /// Attaches to a daemon that sends `bytes` beside `descriptors`, and closes.
    fn attach_to(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Attachment, AttachError> {
        let (client, daemon) = UnixStream::pair().expect("a pair of sockets");
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS as usize))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        sendmsg(&daemon, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).expect("sent");
        drop(descriptors);
        daemon.shutdown(std::net::Shutdown::Write).expect("closed");
        attach_over(client, &Attach::default())
    }

    fn attach_with(body: &Value, descriptors: Vec<OwnedFd>) -> Result<Attachment, AttachError> {
        let count = u32::try_from(descriptors.len()).expect("few");
        attach_to(&encode_frame(FrameKind::Attached, body, count).expect("a frame"), descriptors)
    }

    #[test]
    fn a_good_answer_is_taken() {
        let attachment = attach_with(&answer(), vec![memory(PAGE)]).expect("attached");
        assert_eq!(attachment.descriptors.len(), 1);
        assert_eq!(attachment.tensors[0].shape, [2, 3]);
    }

    #[test]
    fn the_request_reaches_the_daemon_as_one_frame() {
        let (client, mut daemon) = UnixStream::pair().expect("a pair of sockets");
        let request = Attach { model: Some("tiny".parse().expect("a name")), ..Attach::default() };
        let expected = encode_frame(FrameKind::Attach, &request, 0).expect("a frame");
        daemon.shutdown(std::net::Shutdown::Write).expect("closed");
        assert!(matches!(attach_over(client, &request), Err(AttachError::Broken(_))));
        let mut received = Vec::new();
        daemon.read_to_end(&mut received).expect("read");
        assert_eq!(received, expected);
    }

    #[test]
    fn ranges_that_do_not_fit_are_refused() {
        let cases = [
            ("/block/segment", json!(1)),
            ("/block/offset", json!(PAGE)),
            ("/block/bytes", json!(u64::MAX)),
            ("/segments/0/bytes", json!(2 * PAGE)),
            ("/segments/0/bytes", json!(PAGE - 1)),
            ("/segments/0/pageBytes", json!(0)),
            ("/tensors/0/3", json!(48)),
            ("/tensors/0/3", json!(u64::MAX)),
            ("/tensors/0/4", json!(20)),
            ("/tensors/0/2", json!([u64::MAX, u64::MAX])),
            ("/segments", json!([])),
            (
                "/segments/0",
                json!({"bytes": PAGE, "pageBytes": PAGE, "handle": {"type": "cudaPosixFd", "deviceUuid": "GPU-1"}}),
            ),
        ];
        for (place, value) in cases {
            let mut body = answer();
            *body.pointer_mut(place).expect("a place") = value.clone();
            let result = attach_with(&body, vec![memory(PAGE)]);
            assert!(matches!(result, Err(AttachError::Frame(_))), "{place} = {value} was taken");
        }
    }

    #[test]
    fn descriptors_of_a_refused_answer_are_closed() {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let result = attach_with(&answer(), vec![writer.into(), memory(PAGE)]);
        assert!(matches!(result, Err(AttachError::Frame(_))));
        assert_eq!(reader.read(&mut [0]).expect("read"), 0, "somebody still holds the other end");
    }

    #[test]
    fn a_refusal_comes_with_its_code() {
        let error = ApiError::new(ErrorCode::NotResident, "tiny is not resident").hint("load it");
        let frame = encode_frame(FrameKind::Error, &error, 0).expect("a frame");
        let Err(AttachError::Api(received)) = attach_to(&frame, Vec::new()) else { panic!("it was taken") };
        assert_eq!(*received, error);
    }

    #[test]
    fn broken_frames_are_errors() {
        let frame = encode_frame(FrameKind::Attached, &answer(), 1).expect("a frame");
        for length in [1, HEADER_BYTES, HEADER_BYTES + 3, frame.len() - 1] {
            let result = attach_to(&frame[..length], vec![memory(PAGE)]);
            assert!(matches!(result, Err(AttachError::Broken(_))), "{length} bytes were taken");
        }
        assert!(matches!(attach_to(b"HTTP/1.1 400 Bad", Vec::new()), Err(AttachError::Frame(_))));
    }
}
