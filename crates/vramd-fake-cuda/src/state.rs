//! The cards, what is taken of them, and the faults on demand.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// One card of the machine.
#[derive(Debug, Clone)]
pub struct Card {
    /// "GPU-" and a uuid.
    pub uuid: String,
    pub bytes: u64,
    pub others: u64,
}

/// Memory that was created or imported here.
pub struct Memory {
    pub file: i32,
    pub bytes: u64,
    pub card: i32,
    pub created: bool,
    /// Handles and mappings.
    pub uses: u32,
}

/// A reserved range, and what is mapped there.
pub struct Range {
    pub bytes: usize,
    pub memory: Option<u64>,
}

#[derive(Default)]
pub struct State {
    pub memories: HashMap<u64, Memory>,
    pub ranges: HashMap<u64, Range>,
    pub last: u64,
    faults: String,
    calls: HashMap<String, u64>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

pub fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where this copy of the library is.
pub fn beside(name: &str) -> PathBuf {
    static HERE: LazyLock<PathBuf> = LazyLock::new(|| {
        let mut info = libc::Dl_info {
            dli_fname: std::ptr::null(),
            dli_fbase: std::ptr::null_mut(),
            dli_sname: std::ptr::null(),
            dli_saddr: std::ptr::null_mut(),
        };
        // SAFETY: an address of this library; the name that comes lives as long as it.
        let name = unsafe {
            libc::dladdr(std::ptr::from_ref(&STATE).cast(), &raw mut info);
            CStr::from_ptr(info.dli_fname)
        };
        PathBuf::from(OsStr::from_bytes(name.to_bytes()))
    });
    HERE.with_file_name(name)
}

pub fn cards() -> Vec<Card> {
    let text = fs::read_to_string(beside("cards")).unwrap_or_default();
    let card = |line: &str| {
        let mut words = line.split_whitespace();
        let uuid = words.next()?.to_owned();
        let mut number = || words.next().and_then(|word| word.parse().ok());
        Some(Card { uuid, bytes: number()?, others: number().unwrap_or(0) })
    };
    text.lines().filter_map(card).collect()
}

/// The code that a test wants this call to answer; 0 for none.
pub fn fault(call: &str) -> u32 {
    let text = fs::read_to_string(beside("faults")).unwrap_or_default();
    let mut state = state();
    if state.faults != text {
        state.faults.clone_from(&text);
        state.calls.clear();
    }
    let count = state.calls.entry(call.to_owned()).or_default();
    *count += 1;
    let due = |line: &str| {
        let mut words = line.split_whitespace();
        let here = words.next()? == call;
        let number: u64 = words.next()?.parse().ok()?;
        let code = words.next()?.parse().ok()?;
        (here && (number == 0 || number == *count)).then_some(code)
    };
    text.lines().find_map(due).unwrap_or(0)
}

/// Notes that this process has opened a context.
pub fn note_context() {
    let file = fs::OpenOptions::new().create(true).append(true).open(beside("contexts"));
    let noted = file.and_then(|mut file| writeln!(file, "{}", std::process::id()));
    assert!(noted.is_ok(), "the list of contexts cannot be written: {noted:?}");
}

impl State {
    /// What was created on a card by this process and is not given back.
    pub fn used(&self, card: i32) -> u64 {
        let ours = self.memories.values().filter(|memory| memory.created && memory.card == card);
        ours.map(|memory| memory.bytes).sum()
    }

    pub fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// One handle or mapping of a memory less.
    pub fn unuse(&mut self, id: u64) {
        if let Some(memory) = self.memories.get_mut(&id) {
            memory.uses -= 1;
            if memory.uses == 0 {
                // SAFETY: our own descriptor, which nobody uses any more.
                unsafe { libc::close(memory.file) };
                self.memories.remove(&id);
            }
        }
    }
}
