//! The attach socket's side of `protocol/attach.md`: one request, one answer with descriptors, then nothing but moves and
//! their acknowledgements until the connection ends and its lease with it.

use std::io;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vramd_api::attach::{
    Access, Acknowledge, Attach, Attached, AttachedBlock, AttachedSegment, FrameKind, HEADER_BYTES,
    HandleType, Header, MAGIC, encode_frame,
};
use vramd_api::{ApiError, DeviceId, ErrorCode, Holder, LeaseId};
use vramd_device::{Descriptor, DeviceError, ExportAccess, Exported, SegmentId};

use crate::driver::{AttachRequest, AttachTarget, Attachment, Driver, Event, Moved, Told};
use crate::platform::LocalStream;

/// A connection that has not sent its whole request after this long is closed.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that has not taken its whole answer after this long is closed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves one connection until it ends.
pub async fn serve(mut stream: LocalStream, driver: Driver, holder: Holder, stopping: CancellationToken) {
    let (tell, told) = mpsc::unbounded_channel();
    let attachment = match tokio::time::timeout(REQUEST_TIMEOUT, read_request(&mut stream)).await {
        Ok(Ok(request)) => open(&driver, request, holder, tell).await,
        Ok(Err(Malformed::Gone)) => return,
        Ok(Err(Malformed::Refused(error))) => Err(error),
        Err(_) => Err(ApiError::new(
            ErrorCode::Timeout,
            format!("no whole attach frame came within {} seconds", REQUEST_TIMEOUT.as_secs()),
        )),
    };
    let attachment = match attachment {
        Ok(attachment) => attachment,
        Err(error) => {
            let frame = encode_frame(FrameKind::Error, &error, 0).expect("an error is plain data");
            // The peer may be gone: then nobody wants to know.
            let _ = tokio::time::timeout(REQUEST_TIMEOUT, stream.write_all(&frame)).await;
            return;
        }
    };
    let (lease, access) = (attachment.0.lease, attachment.1);
    // A client that does not read its answer holds no lease for ever.
    let answered = tokio::time::timeout(ANSWER_TIMEOUT, answer(&mut stream, &driver, attachment)).await;
    if matches!(answered, Ok(Ok(()))) {
        tokio::select! {
            // Whatever ends it, the peer or a byte that the protocol has no place for: the lease is over.
            _ = follow(&mut stream, &driver, lease, access, told) => {}
            () = stopping.cancelled() => {}
        }
    }
    drop(stream);
    driver.tell(Event::LeaseEnded(lease)).await;
}

/// Tells of moves and takes their acknowledgements, until the connection ends.
async fn follow(
    stream: &mut LocalStream,
    driver: &Driver,
    lease: LeaseId,
    access: Access,
    mut told: mpsc::UnboundedReceiver<Told>,
) -> Result<(), Malformed> {
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    loop {
        tokio::select! {
            read = stream.read(&mut header[filled..]) => {
                match read {
                    Ok(0) | Err(_) => return Err(Malformed::Gone),
                    Ok(count) => filled += count,
                }
                let begun = filled.min(MAGIC.len());
                if header[..begun] != MAGIC[..begun] {
                    return Err(Malformed::Gone);
                }
                if filled == HEADER_BYTES {
                    filled = 0;
                    let body = read_frame(stream, &header, FrameKind::Acknowledge);
                    // While half of it is here nothing is told.
                    let answer: Acknowledge = tokio::time::timeout(REQUEST_TIMEOUT, body)
                        .await
                        .map_err(|_| Malformed::Gone)??;
                    let refused = (!answer.moved).then(|| answer.reason.unwrap_or_default());
                    driver.tell(Event::MoveAnswered { lease, generation: answer.generation, refused }).await;
                }
            }
            Some(told) = told.recv() => {
                let Told::Moved(moved) = told else { return Ok(()) };
                let generation = moved.generation;
                let told = tokio::time::timeout(ANSWER_TIMEOUT, tell(stream, driver, moved, access));
                if let Some(reason) = told.await.map_err(|_| Malformed::Gone)?? {
                    // It keeps its old place, as if it could not follow. Were the connection to close instead, that place
                    // would become others' while this reader has it mapped.
                    driver.tell(Event::MoveAnswered { lease, generation, refused: Some(reason) }).await;
                }
            }
        }
    }
}

/// Sends the descriptor of a new place. Answers why the peer could not be told of it at all: it has not seen a byte then.
async fn tell(
    stream: &mut LocalStream,
    driver: &Driver,
    moved: Moved,
    access: Access,
) -> Result<Option<String>, Malformed> {
    let (descriptor, segment) =
        match export(driver, &moved.device, moved.segment, moved.segment_bytes, access) {
            Ok(exported) => exported,
            Err(error) => return Ok(Some(format!("the daemon cannot export the new place: {error}"))),
        };
    let frame = vramd_api::attach::Moved {
        generation: moved.generation,
        device_id: moved.device,
        segments: vec![segment],
        block: AttachedBlock { segment: 0, offset: moved.block_offset, bytes: moved.block_bytes },
    };
    let frame = encode_frame(FrameKind::Moved, &frame, 1).expect("a place is plain data");
    let sent = match stream.send_with(&frame, &descriptor).await {
        Ok(sent) => sent,
        // If it is gone, the next read says so.
        Err(error) => return Ok(Some(format!("the daemon cannot send the new place: {error}"))),
    };
    stream.write_all(&frame[sent..]).await.map_err(|_| Malformed::Gone)?;
    Ok(None)
}

enum Malformed {
    Gone,
    Refused(ApiError),
}

async fn read_request(stream: &mut LocalStream) -> Result<Attach, Malformed> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(|_| Malformed::Gone)?;
    read_frame(stream, &header, FrameKind::Attach).await
}

/// Reads the body of a frame, which has to be of that kind.
async fn read_frame<T: DeserializeOwned>(
    stream: &mut LocalStream,
    header: &[u8; HEADER_BYTES],
    kind: FrameKind,
) -> Result<T, Malformed> {
    let refused = |error: ApiError| Malformed::Refused(error.hint("protocol/attach.md describes the frames"));
    let header =
        Header::decode(header).map_err(|error| refused(ApiError::invalid("frame", error.to_string())))?;
    if header.kind != kind {
        return Err(refused(ApiError::invalid(
            "frame",
            format!("only a frame of kind {kind:?} has a place here"),
        )));
    }
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body).await.map_err(|_| Malformed::Gone)?;
    serde_json::from_slice(&body).map_err(|error| {
        refused(ApiError::invalid("frame", format!("the body of the {kind:?} frame: {error}")))
    })
}

async fn open(
    driver: &Driver,
    request: Attach,
    holder: Holder,
    tell: mpsc::UnboundedSender<Told>,
) -> Result<(Attachment, Access), ApiError> {
    let target = match (request.model, request.component, request.allocation_id) {
        (Some(model), component, None) => AttachTarget::Model { model, component },
        (None, None, Some(allocation)) => AttachTarget::Allocation(allocation),
        _ => {
            return Err(ApiError::invalid("model", "an attach names either a model or an allocation")
                .hint("send `model`, and `component` if it has several, or `allocationId`"));
        }
    };
    let device = match &request.device_id {
        Some(name) => Some(driver.devices.id(name)?),
        None => None,
    };
    let access = request.access;
    let moves = request.moves;
    let handles = request.handles.unwrap_or_else(|| vec![HandleType::HOST]);
    let request = AttachRequest { target, device, access, holder, moves, handles, tell };
    let attachment = driver.ask(|reply| Event::Attach(Box::new(request), reply)).await?;
    Ok((attachment, access))
}

/// Sends the descriptor and the tensor table.
async fn answer(
    stream: &mut LocalStream,
    driver: &Driver,
    (attachment, access): (Attachment, Access),
) -> io::Result<()> {
    let Attachment { device, segment, segment_bytes, .. } = &attachment;
    let (descriptor, segment) = match export(driver, device, *segment, *segment_bytes, access) {
        Ok(exported) => exported,
        Err(error) => {
            let shown = crate::devices::error(&attachment.device, &error);
            let frame = encode_frame(FrameKind::Error, &shown, 0)?;
            stream.write_all(&frame).await?;
            return Err(io::ErrorKind::Other.into());
        }
    };
    let (model, component) = attachment.model.clone().unzip();
    let attached = Attached {
        lease_id: attachment.lease,
        device_id: attachment.device.clone(),
        allocation_id: attachment.allocation,
        generation: attachment.generation,
        model,
        component,
        access,
        segments: vec![segment],
        block: AttachedBlock { segment: 0, offset: attachment.block_offset, bytes: attachment.block_bytes },
        tensors: attachment.table(),
        metadata: attachment.metadata(),
    };
    let frame = encode_frame(FrameKind::Attached, &attached, 1)?;
    let sent = stream.send_with(&frame, &descriptor).await?;
    stream.write_all(&frame[sent..]).await
}

/// A descriptor of a segment, and what the peer is told of it.
fn export(
    driver: &Driver,
    device: &DeviceId,
    segment: SegmentId,
    bytes: u64,
    access: Access,
) -> Result<(Descriptor, AttachedSegment), DeviceError> {
    let device = driver.devices.get(device).expect("what is attached is on a device that opened");
    let access = match access {
        Access::Read => ExportAccess::Read,
        Access::Write => ExportAccess::Write,
    };
    let Exported { descriptor, handle } = device.export(segment, access)?;
    Ok((descriptor, AttachedSegment { bytes, page_bytes: device.facts().page_bytes, handle }))
}
