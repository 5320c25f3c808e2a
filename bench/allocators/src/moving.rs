//! What moving 2 MiB of shared memory costs: copied, or mapped elsewhere. Microseconds for each piece.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

const PIECE: usize = 2 << 20;
const PIECES: usize = 64;
const PAGE: usize = 4096;

pub struct Moving {
    pub copy: Vec<f64>,
    /// Where the mapping moves with its pages,
    pub remap: Vec<f64>,
    /// and where the file is mapped anew over what was there, with each page touched after.
    pub map_over: Vec<f64>,
}

struct Mapping {
    start: *mut libc::c_void,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize, flags: libc::c_int, file: libc::c_int) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at no particular place.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, file, 0) };
        ensure!(start != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { start, bytes })
    }

    fn piece(&self, piece: usize) -> *mut libc::c_void {
        assert!((piece + 1) * PIECE <= self.bytes);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.byte_add(piece * PIECE) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody refers to it any more.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

pub fn measure() -> Result<Moving> {
    // SAFETY: the name is a string that ends with 0.
    let file = unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(file >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    let bytes = PIECES * PIECE;
    // SAFETY: a descriptor of ours.
    ensure!(unsafe { libc::ftruncate(file, 2 * bytes as i64) } == 0, "ftruncate");
    let shared = Mapping::new(2 * bytes, libc::MAP_SHARED, file).context("the memfd")?;
    // SAFETY: all of the mapping, so that each page is there.
    unsafe { std::ptr::write_bytes(shared.start.cast::<u8>(), 1, 2 * bytes) };
    let reserved = Mapping::new(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)?;
    let mut moving = Moving { copy: Vec::new(), remap: Vec::new(), map_over: Vec::new() };
    let micros = |start: Instant| start.elapsed().as_secs_f64() * 1e6;

    for piece in 0..PIECES {
        let (from, to) = (shared.piece(piece), shared.piece(PIECES + piece));
        let start = Instant::now();
        // SAFETY: two pieces of one mapping that do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast(), PIECE) };
        moving.copy.push(micros(start));
    }
    for piece in 0..PIECES {
        let to = shared.piece(PIECES + piece);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let start = Instant::now();
        // SAFETY: lies over a piece of our own mapping, with the memory of another one.
        let mapped = unsafe { libc::mmap(to, PIECE, access, flags, file, (piece * PIECE) as i64) };
        ensure!(mapped == to, "mmap: {}", std::io::Error::last_os_error());
        touch(to);
        moving.map_over.push(micros(start));
    }
    for piece in 0..PIECES {
        let (from, to) = (shared.piece(piece), reserved.piece(piece));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let start = Instant::now();
        // SAFETY: moves a piece of our own mapping over a reserved one; nobody refers to either.
        let mapped = unsafe { libc::mremap(from, PIECE, PIECE, flags, to) };
        ensure!(mapped == to, "mremap: {}", std::io::Error::last_os_error());
        touch(to);
        moving.remap.push(micros(start));
    }
    // SAFETY: a descriptor of ours, closed once.
    unsafe { libc::close(file) };
    Ok(moving)
}

fn touch(piece: *mut libc::c_void) {
    for offset in (0..PIECE).step_by(PAGE) {
        // SAFETY: within a mapped piece.
        std::hint::black_box(unsafe { piece.byte_add(offset).cast::<u8>().read_volatile() });
    }
}
