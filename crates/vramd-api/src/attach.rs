//! The frames of the attach protocol; `protocol/attach.md` is its document.
//!
//! A connection carries one `Attach` from the client and one `Attached` or `Error` from the daemon, then
//! nothing but `Moved` and its `Acknowledge`: it is the lease. Descriptors travel with the first byte of a frame's header; on
//! Windows they are handles that the daemon has opened in the client's process, and follow the header, eight bytes each.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::IntoDeserializer as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{AllocationId, ComponentName, DeviceId, LeaseId, ModelName};

pub use crate::dtype::{Dtype, Packed};
pub use safetensors::Dtype as PlainDtype;

/// The first bytes of every frame. No HTTP method begins so, which lets both share one socket.
pub const MAGIC: [u8; 4] = *b"VRMD";
/// The version of the frames.
pub const VERSION: u16 = 1;
/// A header: magic, version (u16), kind (u16), body length (u32), descriptor count (u32); little-endian.
pub const HEADER_BYTES: usize = 16;
/// The longest body that a client may send.
pub const MAX_REQUEST_BYTES: u32 = 64 << 10;
/// The longest body that a daemon may send.
pub const MAX_REPLY_BYTES: u32 = 256 << 20;
/// What one descriptor takes in a frame on Windows.
pub const DESCRIPTOR_BYTES: usize = 8;
/// The most descriptors in one frame: the kernel's bound on one message.
pub const MAX_DESCRIPTORS: u32 = 253;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    Attach = 1,
    Attached = 2,
    Error = 3,
    Moved = 4,
    Acknowledge = 5,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: FrameKind,
    pub body_bytes: u32,
    pub descriptors: u32,
}

/// Sixteen bytes that are no header of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    #[error("the frame does not begin with VRMD")]
    Magic,
    #[error("the frame has version {0}; this side speaks version {VERSION}")]
    Version(u16),
    #[error("there is no frame of kind {0}")]
    Kind(u16),
    #[error("the frame's body has {bytes} bytes; at most {limit} are allowed")]
    Body { bytes: u32, limit: u32 },
    #[error("the frame announces {count} descriptors; at most {limit} are allowed")]
    Descriptors { count: u32, limit: u32 },
}

impl Header {
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[12..].copy_from_slice(&self.descriptors.to_le_bytes());
        bytes
    }

    /// Reads a header and holds it to the bounds of its kind: only the daemon sends descriptors.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BadHeader> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != MAGIC {
            return Err(BadHeader::Magic);
        }
        if u16_at(4) != VERSION {
            return Err(BadHeader::Version(u16_at(4)));
        }
        let (kind, body_limit, descriptor_limit) = match u16_at(6) {
            1 => (FrameKind::Attach, MAX_REQUEST_BYTES, 0),
            2 => (FrameKind::Attached, MAX_REPLY_BYTES, MAX_DESCRIPTORS),
            3 => (FrameKind::Error, MAX_REQUEST_BYTES, 0),
            4 => (FrameKind::Moved, MAX_REQUEST_BYTES, MAX_DESCRIPTORS),
            5 => (FrameKind::Acknowledge, MAX_REQUEST_BYTES, 0),
            other => return Err(BadHeader::Kind(other)),
        };
        let header = Self { kind, body_bytes: u32_at(8), descriptors: u32_at(12) };
        if header.body_bytes > body_limit {
            return Err(BadHeader::Body { bytes: header.body_bytes, limit: body_limit });
        }
        if header.descriptors > descriptor_limit {
            return Err(BadHeader::Descriptors { count: header.descriptors, limit: descriptor_limit });
        }
        Ok(header)
    }
}

/// Puts a header before a JSON body.
pub fn encode_frame(
    kind: FrameKind,
    body: &impl Serialize,
    descriptors: u32,
) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut bytes, body)?;
    let body_bytes = u32::try_from(bytes.len() - HEADER_BYTES)
        .map_err(|_| serde::ser::Error::custom("the body of a frame is larger than 4 GiB"))?;
    bytes[..HEADER_BYTES].copy_from_slice(&Header { kind, body_bytes, descriptors }.encode());
    Ok(bytes)
}

/// What the client wants to do with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Access {
    /// Shared and read-only.
    #[default]
    Read,
    /// Shared and writable: allocations only.
    Write,
}

/// The client's request: a model, or an allocation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Attach {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// Needed when the model has more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<ComponentName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_id: Option<AllocationId>,
    /// A device id or uuid; needed when the component is resident on more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    #[serde(default)]
    pub access: Access,
    /// This client follows moves: without it the bytes stay where they are for as long as it has them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moves: bool,
    /// The kinds of descriptors that it can import; absent is that of host memory alone. Kinds that are not known here are left out.
    #[serde(default, deserialize_with = "known", skip_serializing_if = "Option::is_none")]
    pub handles: Option<Vec<HandleType>>,
}

impl Attach {
    /// Whether it can import descriptors of that kind.
    pub fn takes(&self, handle: HandleType) -> bool {
        self.handles.as_ref().map_or(handle == HandleType::HOST, |handles| handles.contains(&handle))
    }
}

/// A newer client may name what only newer daemons have.
fn known<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<HandleType>>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    let known = |name: String| -> Option<HandleType> {
        let name: serde::de::value::StringDeserializer<serde::de::value::Error> = name.into_deserializer();
        HandleType::deserialize(name).ok()
    };
    Ok(Some(names.into_iter().filter_map(known).collect()))
}

/// What the descriptors of a device's memory are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum HandleType {
    /// Host memory on Linux, mapped with `mmap`.
    Memfd,
    /// Host memory on Windows, mapped with `MapViewOfFile`.
    FileMapping,
    /// Imported by Vulkan, as `VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT`.
    VulkanOpaqueFd,
    /// Imported by CUDA, as `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
    CudaPosixFd,
    /// Opened by Direct3D 12 with `OpenSharedHandle`, as a heap.
    D3d12Heap,
}

/// One descriptor's kind, with what its importer has to know.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Handle {
    #[default]
    Memfd,
    FileMapping,
    /// Only the same driver on the same device may import it: another may answer success, and have other bytes.
    VulkanOpaqueFd {
        /// `VkPhysicalDeviceIDProperties::deviceUUID`.
        device_uuid: Uuid,
        /// `VkPhysicalDeviceIDProperties::driverUUID`.
        driver_uuid: Uuid,
        memory_type_index: u32,
        /// `VkMemoryAllocateInfo::allocationSize`.
        allocation_bytes: u64,
    },
    /// `bytes` of the segment are the size to map it with.
    CudaPosixFd {
        /// As `nvidia-smi -L` prints it, and as `CUDA_VISIBLE_DEVICES` takes it.
        device_uuid: String,
    },
    D3d12Heap {
        /// Of the adapter to open it on: high and low part, 16 hexadecimal digits.
        adapter_luid: String,
    },
}

impl HandleType {
    /// What host memory is handed out as.
    pub const HOST: Self = if cfg!(windows) { Self::FileMapping } else { Self::Memfd };
}

impl Handle {
    /// What host memory is handed out as.
    pub const HOST: Self = if cfg!(windows) { Self::FileMapping } else { Self::Memfd };

    pub fn kind(&self) -> HandleType {
        match self {
            Self::Memfd => HandleType::Memfd,
            Self::VulkanOpaqueFd { .. } => HandleType::VulkanOpaqueFd,
            Self::FileMapping => HandleType::FileMapping,
            Self::CudaPosixFd { .. } => HandleType::CudaPosixFd,
            Self::D3d12Heap { .. } => HandleType::D3d12Heap,
        }
    }

    fn is_memfd(&self) -> bool {
        *self == Self::Memfd
    }
}

/// The bytes have another place: the same bytes, at the same offset in their pages. The client maps the new pages over
/// the old ones and acknowledges; until then the old ones stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Moved {
    pub generation: u64,
    pub device_id: DeviceId,
    pub segments: Vec<AttachedSegment>,
    pub block: AttachedBlock,
}

/// The client's answer to [`Moved`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Acknowledge {
    pub generation: u64,
    /// False: it cannot follow, keeps the old pages, and is not asked again.
    pub moved: bool,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The daemon's answer: where the bytes are, and which tensors they hold.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attached {
    pub lease_id: LeaseId,
    pub device_id: DeviceId,
    pub allocation_id: AllocationId,
    pub generation: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<ComponentName>,
    pub access: Access,
    /// One for each descriptor in the frame, in order.
    pub segments: Vec<AttachedSegment>,
    /// Where in the segments the bytes are.
    pub block: AttachedBlock,
    /// A JSON array of [`Tensor`]; kept raw, since the daemon prints it once and a client reads it once.
    pub tensors: Arc<RawValue>,
    /// `__metadata__` of the file.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

impl Attached {
    pub fn tensors(&self) -> Result<Vec<Tensor>, serde_json::Error> {
        serde_json::from_str(self.tensors.get())
    }
}

/// How to map one descriptor: `bytes` from its beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachedSegment {
    pub bytes: u64,
    /// The page size behind it, which a mapping's length is a multiple of.
    pub page_bytes: u64,
    /// Absent for a memfd.
    #[serde(default, skip_serializing_if = "Handle::is_memfd")]
    pub handle: Handle,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachedBlock {
    /// An index into `segments`.
    pub segment: u32,
    pub offset: u64,
    pub bytes: u64,
}

/// One tensor. On the wire an array, `[name, dtype, shape, offset, bytes]`: a model has thousands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "TensorRow", into = "TensorRow")]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// From the beginning of the block, in bytes.
    pub offset: u64,
    pub bytes: u64,
}

type TensorRow = (String, Dtype, Vec<u64>, u64, u64);

impl From<TensorRow> for Tensor {
    fn from((name, dtype, shape, offset, bytes): TensorRow) -> Self {
        Self { name, dtype, shape, offset, bytes }
    }
}

impl From<Tensor> for TensorRow {
    fn from(tensor: Tensor) -> Self {
        (tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_sixteen_bytes_are_a_header_or_an_error(bytes: [u8; HEADER_BYTES]) {
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn headers_read_back(kind in 1u16..=3, body in 0u32..=MAX_REQUEST_BYTES) {
            let kind = [FrameKind::Attach, FrameKind::Attached, FrameKind::Error][usize::from(kind) - 1];
            let header = Header { kind, body_bytes: body, descriptors: 0 };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn handles_of_newer_clients_are_left_out_and_none_is_not_absent() {
        let read = |text: &str| serde_json::from_str::<Attach>(text).expect("a request");
        let request = read(r#"{"model": "tiny", "handles": ["aNewerOne", "cudaPosixFd"]}"#);
        assert_eq!(request.handles, Some(vec![HandleType::CudaPosixFd]));
        assert!(!request.takes(HandleType::HOST));
        assert!(!read(r#"{"model": "tiny", "handles": ["aNewerOne"]}"#).takes(HandleType::HOST));
        assert!(read(r#"{"model": "tiny"}"#).takes(HandleType::HOST));
    }

    #[test]
    fn headers_out_of_bounds_are_refused() {
        let header = |kind, body_bytes, descriptors| {
            Header::decode(&Header { kind, body_bytes, descriptors }.encode())
        };
        assert!(matches!(header(FrameKind::Attach, MAX_REQUEST_BYTES + 1, 0), Err(BadHeader::Body { .. })));
        assert!(matches!(header(FrameKind::Attach, 0, 1), Err(BadHeader::Descriptors { .. })));
        assert!(matches!(header(FrameKind::Attached, 0, 254), Err(BadHeader::Descriptors { .. })));
        let mut other = Header { kind: FrameKind::Attach, body_bytes: 0, descriptors: 0 }.encode();
        other[4] = 9;
        assert_eq!(Header::decode(&other), Err(BadHeader::Version(9)));
    }
}
