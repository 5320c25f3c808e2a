//! The attach socket's side of `protocol/attach.md`: one request, one answer with descriptors, then silence until the
//! connection ends and its lease with it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use vramd_api::attach::{
    Access, Attach, Attached, AttachedBlock, AttachedSegment, FrameKind, HEADER_BYTES, Header, encode_frame,
};
use vramd_api::{ApiError, ErrorCode, Holder};
use vramd_device::ExportAccess;

use crate::driver::{AttachRequest, AttachTarget, Attachment, Driver, Event};

/// A connection that has not sent its whole request after this long is closed.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that has not taken its whole answer after this long is closed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves one connection until it ends.
pub async fn serve(mut stream: UnixStream, driver: Driver, holder: Holder, stopping: CancellationToken) {
    let attachment = match tokio::time::timeout(REQUEST_TIMEOUT, read_request(&mut stream)).await {
        Ok(Ok(request)) => open(&driver, request, holder).await,
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
    let lease = attachment.0.lease;
    // A client that does not read its answer holds no lease for ever.
    let answered = tokio::time::timeout(ANSWER_TIMEOUT, answer(&mut stream, &driver, attachment)).await;
    if matches!(answered, Ok(Ok(()))) {
        let mut byte = [0];
        tokio::select! {
            // Whatever it is, the end or a byte that the protocol has no place for: the lease is over.
            _ = stream.read(&mut byte) => {}
            () = stopping.cancelled() => {}
        }
    }
    drop(stream);
    driver.tell(Event::LeaseEnded(lease)).await;
}

enum Malformed {
    Gone,
    Refused(ApiError),
}

async fn read_request(stream: &mut UnixStream) -> Result<Attach, Malformed> {
    let refused = |error: ApiError| Malformed::Refused(error.hint("protocol/attach.md describes the frames"));
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(|_| Malformed::Gone)?;
    let header =
        Header::decode(&header).map_err(|error| refused(ApiError::invalid("frame", error.to_string())))?;
    if header.kind != FrameKind::Attach {
        return Err(refused(ApiError::invalid("frame", "only an attach frame can come first")));
    }
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body).await.map_err(|_| Malformed::Gone)?;
    serde_json::from_slice(&body)
        .map_err(|error| refused(ApiError::invalid("frame", format!("the attach frame's body: {error}"))))
}

async fn open(driver: &Driver, request: Attach, holder: Holder) -> Result<(Attachment, Access), ApiError> {
    let target = match (request.model, request.component, request.allocation_id) {
        (Some(model), component, None) => AttachTarget::Model { model, component },
        (None, None, Some(allocation)) => AttachTarget::Allocation(allocation),
        _ => {
            return Err(ApiError::invalid("model", "an attach names either a model or an allocation")
                .hint("send `model`, and `component` if it has several, or `allocationId`"));
        }
    };
    let device = match &request.device_id {
        Some(name) => Some(driver.devices.named(name)?.facts().device.clone()),
        None => None,
    };
    let access = request.access;
    let request = AttachRequest { target, device, access, holder };
    let attachment = driver.ask(|reply| Event::Attach(Box::new(request), reply)).await?;
    Ok((attachment, access))
}

/// Sends the descriptor and the tensor table.
async fn answer(
    stream: &mut UnixStream,
    driver: &Driver,
    (attachment, access): (Attachment, Access),
) -> io::Result<()> {
    let device = driver.devices.get(&attachment.device).cloned().ok_or(io::ErrorKind::NotFound)?;
    let page_bytes = device.facts().page_bytes;
    let export = match access {
        Access::Read => ExportAccess::Read,
        Access::Write => ExportAccess::Write,
    };
    let segment = attachment.segment;
    let descriptor = match device.export(segment, export) {
        Ok(descriptor) => descriptor,
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
        segments: vec![AttachedSegment { bytes: attachment.segment_bytes, page_bytes }],
        block: AttachedBlock { segment: 0, offset: attachment.block_offset, bytes: attachment.block_bytes },
        tensors: attachment.table(),
        metadata: attachment.metadata(),
    };
    let frame = encode_frame(FrameKind::Attached, &attached, 1)?;
    let sent = send_with(stream, &frame, descriptor.as_fd()).await?;
    stream.write_all(&frame[sent..]).await
}

/// Sends the beginning of a frame with its descriptor; answers how many bytes went along.
async fn send_with(stream: &UnixStream, frame: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<usize> {
    stream
        .async_io(Interest::WRITABLE, || {
            let descriptors = [descriptor];
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
