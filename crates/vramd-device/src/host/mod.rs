//! What the machine itself says: how much memory there is, how much of it is to be had, and who it is.

#[cfg(unix)]
mod linux;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub(crate) use linux::Host;
#[cfg(windows)]
pub(crate) use windows::Host;

impl Host {
    /// What is kept back so that a full device never means a machine without memory.
    pub(crate) fn headroom_bytes(&self) -> u64 {
        (self.total_bytes() / 50).max(64 << 20)
    }

    /// What the machine would give now, less the headroom.
    pub(crate) fn available_bytes(&self) -> Result<u64, crate::DeviceError> {
        Ok(self.free_bytes()?.saturating_sub(self.headroom_bytes()))
    }
}
