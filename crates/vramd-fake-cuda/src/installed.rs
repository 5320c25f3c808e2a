//! For tests: a copy of the library in a directory, and the files beside it that steer it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::state::used_beside;

/// A driver with cards and faults of its own.
#[derive(Debug)]
pub struct Installed {
    home: PathBuf,
    /// The uuids of its cards.
    pub cards: Vec<String>,
    last: AtomicU64,
}

impl Installed {
    /// Puts a driver into an empty directory. Cargo builds it into the one of the tests that depend on it.
    pub fn new(home: &Path, cards: Vec<String>, bytes: u64) -> io::Result<Self> {
        let built = std::env::current_exe()?.with_file_name("libvramd_fake_cuda.so");
        fs::copy(built, home.join("libcuda.so.1"))?;
        // One library to the linker, under two names.
        std::os::unix::fs::symlink("libcuda.so.1", home.join("libnvidia-ml.so.1"))?;
        let installed = Self { home: home.to_owned(), cards, last: AtomicU64::new(0) };
        installed.set_others(bytes, 0)?;
        Ok(installed)
    }

    pub fn cuda(&self) -> PathBuf {
        self.home.join("libcuda.so.1")
    }

    pub fn nvml(&self) -> PathBuf {
        self.home.join("libnvidia-ml.so.1")
    }

    /// Each card has `bytes`, of which other programs hold `others`.
    pub fn set_others(&self, bytes: u64, others: u64) -> io::Result<()> {
        let line = |uuid: &String| format!("{uuid} {bytes} {others}\n");
        self.write("cards", &self.cards.iter().map(line).collect::<String>())
    }

    /// Has the `number`th call of a function from now on, in each process, answer `code`; 0 for every call.
    pub fn fail(&self, call: &str, number: u32, code: u32) -> io::Result<()> {
        // Never the same text twice: it would not start counting anew.
        let count = self.last.fetch_add(1, Ordering::Relaxed);
        self.write("faults", &format!("{call} {number} {code}\n# {count}\n"))
    }

    /// No call fails any more.
    pub fn mend(&self) -> io::Result<()> {
        self.fail("nothing", 1, 0)
    }

    /// What any process has of a card.
    pub fn used_bytes(&self, card: i32) -> u64 {
        used_beside(&self.home.join("uses"), card)
    }

    /// Lets no copy end, until it does again.
    pub fn hang(&self, hangs: bool) -> io::Result<()> {
        let file = self.home.join("hang");
        let _ = fs::remove_file(self.home.join("hanging"));
        if hangs { fs::write(file, "") } else { fs::remove_file(file) }
    }

    /// Has the driver report a fault of a card, once.
    pub fn report_xid(&self, card: usize, code: u64) -> io::Result<()> {
        self.write(&format!("xid.{card}"), &code.to_string())
    }

    /// Whether a copy waits.
    pub fn is_hanging(&self) -> bool {
        self.home.join("hanging").exists()
    }

    /// The processes that have ever opened a context.
    pub fn contexts(&self) -> BTreeSet<u32> {
        let text = fs::read_to_string(self.home.join("contexts")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// In one step, as a reader sees it.
    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let new = self.home.join(format!("{name}.new"));
        fs::write(&new, text)?;
        fs::rename(new, self.home.join(name))
    }
}

/// The arguments of a loader, in a test that was started as one: the program, `--exact`, the test, `--nocapture`, and these.
pub fn loader_arguments() -> Option<(PathBuf, String)> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, _, _, _, library, card] = arguments.as_slice() else { return None };
    Some((library.into(), card.clone()))
}
