//! Who may open what, and who is at the serving end of a pipe.

use std::io;
use std::os::windows::io::{AsHandle, AsRawHandle as _, FromRawHandle as _, OwnedHandle};

use windows::Win32::Foundation::{HANDLE, HLOCAL, LocalFree};
use windows::Win32::Security::Authorization::{
    ConvertSidToStringSidW, ConvertStringSecurityDescriptorToSecurityDescriptorW, GetSecurityInfo,
    SDDL_REVISION_1, SE_KERNEL_OBJECT,
};
use windows::Win32::Security::{
    EqualSid, GetTokenInformation, IsWellKnownSid, OWNER_SECURITY_INFORMATION, PSECURITY_DESCRIPTOR, PSID,
    SECURITY_ATTRIBUTES, TOKEN_QUERY, TOKEN_USER, TokenUser, WinBuiltinAdministratorsSid, WinLocalSystemSid,
};
use windows::Win32::System::Pipes::GetNamedPipeServerProcessId;
use windows::Win32::System::Threading::{
    GetCurrentProcess, OpenProcess, OpenProcessToken, PROCESS_QUERY_LIMITED_INFORMATION,
};
use windows::core::{HSTRING, PCWSTR, PWSTR};

use crate::system;

/// The rights to something that is being made.
#[derive(Debug)]
pub struct Security(PSECURITY_DESCRIPTOR);

// SAFETY: plain memory of its own, which is only read.
unsafe impl Send for Security {}
// SAFETY: as above.
unsafe impl Sync for Security {}

impl Security {
    /// For nobody: others get there by handles that they were handed, with the rights of those and no more.
    pub fn nobody() -> io::Result<Self> {
        Self::parse("D:P")
    }

    /// For this process's user, the system and administrators.
    pub fn own_user() -> io::Result<Self> {
        let user = User::own()?;
        let mut text = PWSTR::null();
        // SAFETY: the user's id lives; the text that comes is ours to free.
        let name = unsafe {
            ConvertSidToStringSidW(user.sid(), &raw mut text).map_err(system)?;
            let name = text.to_string();
            let _ = LocalFree(Some(HLOCAL(text.0.cast())));
            name.map_err(io::Error::other)?
        };
        Self::parse(&format!("D:P(A;;GA;;;{name})(A;;GA;;;SY)(A;;GA;;;BA)"))
    }

    fn parse(text: &str) -> io::Result<Self> {
        let text = HSTRING::from(text);
        let mut made = PSECURITY_DESCRIPTOR::default();
        // SAFETY: the text ends with a zero; what comes is ours to free.
        unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                PCWSTR(text.as_ptr()),
                SDDL_REVISION_1,
                &raw mut made,
                None,
            )
        }
        .map_err(system)?;
        Ok(Self(made))
    }

    /// As the calls want it that make something; no program that is started inherits the handle.
    pub fn attributes(&self) -> SECURITY_ATTRIBUTES {
        SECURITY_ATTRIBUTES {
            nLength: size_of::<SECURITY_ATTRIBUTES>() as u32,
            lpSecurityDescriptor: self.0.0,
            bInheritHandle: false.into(),
        }
    }
}

impl Drop for Security {
    fn drop(&mut self) {
        // SAFETY: it was made for us to free, and is used no more.
        let _ = unsafe { LocalFree(Some(HLOCAL(self.0.0))) };
    }
}

/// A user's id, as a token has it.
struct User(Vec<u64>);

impl User {
    fn own() -> io::Result<Self> {
        // SAFETY: it stands for this process and is never closed.
        Self::of(unsafe { GetCurrentProcess() })
    }

    fn of(process: HANDLE) -> io::Result<Self> {
        // As large as ids get, in words so that it is aligned.
        let mut token_user = vec![0_u64; 32];
        let mut length = 0;
        // SAFETY: the caller's handle lives; the token that comes is ours, and the buffer is as long as is said.
        unsafe {
            let mut token = HANDLE::default();
            OpenProcessToken(process, TOKEN_QUERY, &raw mut token).map_err(system)?;
            let _token = OwnedHandle::from_raw_handle(token.0);
            let bytes = size_of_val(&*token_user) as u32;
            let into = token_user.as_mut_ptr().cast();
            GetTokenInformation(token, TokenUser, Some(into), bytes, &raw mut length).map_err(system)?;
        }
        Ok(Self(token_user))
    }

    fn sid(&self) -> PSID {
        // SAFETY: the system has put that structure at its beginning, and what it points to behind it.
        unsafe { (*self.0.as_ptr().cast::<TOKEN_USER>()).User.Sid }
    }
}

/// Whether what serves a pipe is this process's user, the system or an administrator: anybody may make a pipe of any name.
pub fn is_trusted(pipe: impl AsHandle) -> io::Result<bool> {
    let pipe = HANDLE(pipe.as_handle().as_raw_handle());
    let user = User::own()?;
    Ok(is_served_by(pipe, &user).unwrap_or(false) || is_owned_by_trusted(pipe, &user)?)
}

/// Whether the process at the other end is of that user. Not everyone's can be looked at.
fn is_served_by(pipe: HANDLE, user: &User) -> io::Result<bool> {
    let mut pid = 0;
    // SAFETY: the handle lives; the one that comes is ours, and both ids live.
    unsafe {
        GetNamedPipeServerProcessId(pipe, &raw mut pid).map_err(system)?;
        let server = OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION, false, pid).map_err(system)?;
        let _server = OwnedHandle::from_raw_handle(server.0);
        Ok(EqualSid(User::of(server)?.sid(), user.sid()).is_ok())
    }
}

fn is_owned_by_trusted(pipe: HANDLE, user: &User) -> io::Result<bool> {
    let (mut owner, mut held) = (PSID::default(), PSECURITY_DESCRIPTOR::default());
    // SAFETY: the handle lives; the owner lies in what is held, which is ours to free, and is used before.
    unsafe {
        GetSecurityInfo(
            pipe,
            SE_KERNEL_OBJECT,
            OWNER_SECURITY_INFORMATION,
            Some(&raw mut owner),
            None,
            None,
            None,
            Some(&raw mut held),
        )
        .ok()
        .map_err(system)?;
        let trusted = EqualSid(owner, user.sid()).is_ok()
            || IsWellKnownSid(owner, WinLocalSystemSid).as_bool()
            || IsWellKnownSid(owner, WinBuiltinAdministratorsSid).as_bool();
        let _ = LocalFree(Some(HLOCAL(held.0)));
        Ok(trusted)
    }
}
