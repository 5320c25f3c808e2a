//! The cards, what is taken of them, and the faults on demand.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
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
    /// Of the file: the same in every process.
    pub inode: u64,
    pub bytes: u64,
    pub card: i32,
    /// Handles and mappings.
    pub uses: u32,
}

/// A reserved range, and what is mapped there.
pub struct Range {
    pub bytes: usize,
    pub memory: Option<u64>,
    /// The card that may use it.
    pub access: Option<i32>,
}

#[derive(Default)]
pub struct State {
    pub memories: HashMap<u64, Memory>,
    pub ranges: HashMap<u64, Range>,
    pub last: u64,
    /// By their numbers: the cards whose reports they get, as handles of NVML.
    pub event_sets: HashMap<usize, usize>,
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
        // The last two words are numbers; a call may be two words.
        let mut words = line.rsplitn(3, ' ').collect::<Vec<_>>().into_iter().rev();
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

/// What any living process has of a card, by handle or mapping: memory is free when the last of them has let go.
pub fn used(card: i32) -> u64 {
    used_beside(&beside("uses"), card)
}

pub fn used_beside(uses: &Path, card: i32) -> u64 {
    let mut found = HashMap::new();
    for process in fs::read_dir(uses).into_iter().flatten().flatten() {
        if !lives(&process.file_name().to_string_lossy()) {
            continue;
        }
        for line in fs::read_to_string(process.path()).unwrap_or_default().lines() {
            let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            if let [on, inode, bytes] = numbers[..]
                && on == card as u64
            {
                found.insert(inode, bytes);
            }
        }
    }
    found.values().sum()
}

/// Whether a process is there, and not only its exit status.
fn lives(process: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

impl State {
    pub fn insert(&mut self, id: u64, memory: Memory) {
        self.memories.insert(id, memory);
        self.publish();
    }

    /// Says to all processes what this one has.
    fn publish(&self) {
        let line = |memory: &Memory| format!("{} {} {}\n", memory.card, memory.inode, memory.bytes);
        let text: String = self.memories.values().map(line).collect();
        let (uses, process) = (beside("uses"), std::process::id().to_string());
        let new = beside(&format!("uses.{process}"));
        let written = fs::create_dir_all(&uses)
            .and_then(|()| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, uses.join(process)));
        assert!(written.is_ok(), "what is used cannot be written: {written:?}");
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
                self.publish();
            }
        }
    }
}
