//! Which pages segments are made of, chosen once, and what to say about it.

use crate::host::Host;
use crate::segment::Backing;
#[cfg(unix)]
use crate::segment::HUGE_PAGE_BYTES;

/// The size of a base page on the machines that we run on.
pub(super) const BASE_PAGE_BYTES: u64 = 4096;

/// What the system reserves addresses in.
#[cfg(windows)]
const GRANULARITY_BYTES: u64 = 64 << 10;

#[cfg(unix)]
const TRANSPARENT: &str = "sys/kernel/mm/transparent_hugepage/shmem_enabled";
#[cfg(unix)]
const POOL: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pages {
    pub(super) backing: Backing,
    pub(super) notes: Vec<String>,
}

#[cfg(windows)]
impl Pages {
    /// Large pages there are only for who holds a privilege that programs rarely have.
    pub(super) fn choose(_host: &Host) -> Self {
        Self { backing: Backing::SmallPages, notes: Vec::new() }
    }

    #[allow(clippy::unused_self, reason = "elsewhere it depends on the pages")]
    pub(super) fn granularity_bytes(&self) -> u64 {
        GRANULARITY_BYTES
    }

    #[allow(clippy::unused_self, reason = "elsewhere it depends on the pages")]
    pub(super) fn page_bytes(&self) -> u64 {
        BASE_PAGE_BYTES
    }
}

#[cfg(unix)]
impl Pages {
    /// Transparent huge pages before the pool: they need no share of the memory set aside. Base pages last.
    pub(super) fn choose(host: &Host) -> Self {
        let setting = host.text(TRANSPARENT).unwrap_or_default();
        let active = setting.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
        if matches!(active, Some("always" | "within_size" | "advise" | "force")) {
            return Self { backing: Backing::TransparentHugePages, notes: Vec::new() };
        }
        let why = format!(
            "transparent huge pages for shared memory are off ({})",
            active.map_or_else(|| format!("no /{TRANSPARENT}"), |word| format!("/{TRANSPARENT} is {word}")),
        );
        let pool: u64 = host.text(POOL).and_then(|count| count.parse().ok()).unwrap_or(0);
        if pool > 0 {
            let pool = vramd_api::Bytes::show(pool * HUGE_PAGE_BYTES);
            let note = format!(
                "{why}: segments use the machine's huge page pool of {pool}, and 4 KiB pages once it is empty"
            );
            return Self { backing: Backing::HugePagePool, notes: vec![note] };
        }
        let note = format!(
            "{why} and the huge page pool is empty: segments use 4 KiB pages, and both loading and first touch \
             are slower. As root: echo advise > /{TRANSPARENT}"
        );
        Self { backing: Backing::SmallPages, notes: vec![note] }
    }

    pub(super) fn granularity_bytes(&self) -> u64 {
        if self.backing == Backing::SmallPages { BASE_PAGE_BYTES } else { HUGE_PAGE_BYTES }
    }

    /// Only the pool's pages force their size on a mapping.
    pub(super) fn page_bytes(&self) -> u64 {
        if self.backing == Backing::HugePagePool { HUGE_PAGE_BYTES } else { BASE_PAGE_BYTES }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::fs;

    fn choose(files: &[(&str, &str)]) -> Pages {
        let tree = tempfile::tempdir().unwrap();
        for (path, text) in
            files.iter().chain(&[("proc/meminfo", "MemTotal: 1024 kB\nMemAvailable: 512 kB\n")])
        {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Pages::choose(&Host::at(tree.path()).unwrap())
    }

    #[test]
    fn transparent_huge_pages_are_taken_where_they_are_allowed() {
        let pages = choose(&[(TRANSPARENT, "always within_size [advise] never deny force\n"), (POOL, "8\n")]);
        assert_eq!(pages, Pages { backing: Backing::TransparentHugePages, notes: vec![] });
        assert_eq!((pages.granularity_bytes(), pages.page_bytes()), (2 << 20, 4096));
    }

    #[test]
    fn the_pool_is_next_and_the_note_names_its_size() {
        let pages = choose(&[(TRANSPARENT, "always within_size advise [never] deny force\n"), (POOL, "8\n")]);
        assert_eq!(pages.backing, Backing::HugePagePool);
        assert!(pages.notes[0].contains("16.0 MiB"), "{:?}", pages.notes);
        assert_eq!((pages.granularity_bytes(), pages.page_bytes()), (2 << 20, 2 << 20));
    }

    #[test]
    fn base_pages_are_the_stated_last_resort() {
        for files in [&[][..], &[(TRANSPARENT, "always advise [never]\n"), (POOL, "0\n")][..]] {
            let pages = choose(files);
            assert_eq!((pages.backing, pages.granularity_bytes()), (Backing::SmallPages, 4096));
            assert!(pages.notes[0].contains("echo advise"), "{:?}", pages.notes);
        }
    }
}
