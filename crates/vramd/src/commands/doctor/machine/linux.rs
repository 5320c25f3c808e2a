//! Everything is read below a root, so that tests bring their own.

use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vramd_api::Bytes;

use super::{Check, LEAST_MEMORY};

/// The oldest kernel with everything that the daemon uses.
const KERNEL: (u32, u32) = (5, 14);
/// Enough descriptors for the segments and connections of a busy machine.
const OPEN_FILES: u64 = 4096;

const HUGE_PAGES: &str = "sys/kernel/mm/transparent_hugepage/shmem_enabled";

pub fn checks() -> Vec<Check> {
    let mut checks = checks_of(Path::new("/"));
    checks.push(sealed_memory());
    checks
}

fn checks_of(root: &Path) -> Vec<Check> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let meminfo = read("proc/meminfo").unwrap_or_default();
    let limits = read("proc/self/limits").unwrap_or_default();
    vec![
        kernel(&read("proc/sys/kernel/osrelease").unwrap_or_default()),
        memory(&meminfo),
        control_group(root, &read("proc/self/cgroup").unwrap_or_default()),
        huge_pages(read(HUGE_PAGES).as_deref(), meminfo_value(&meminfo, "HugePages_Total").unwrap_or(0)),
        swap(&meminfo),
        locked_memory(&limits),
        open_files(&limits),
        pressure(read("proc/pressure/memory").is_some()),
    ]
}

/// Whether memory can be shared so that no reader can ever write to it.
fn sealed_memory() -> Check {
    let sealed = memfd_create("vramd-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .and_then(|memory| fcntl_add_seals(memory, SealFlags::SHRINK | SealFlags::FUTURE_WRITE));
    match sealed {
        Ok(()) => Check::ok("shared memory", "memory can be shared read-only (memfd with seals)"),
        Err(error) => Check::fault(
            "shared memory",
            format!("memory cannot be shared read-only: {error}"),
            "a sandbox may refuse memfd_create or its seals: look at its filter of system calls",
        ),
    }
}

fn kernel(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (0, 0),
    };
    let release = release.trim();
    if version >= KERNEL {
        return Check::ok("kernel", format!("Linux {release}"));
    }
    let (major, minor) = KERNEL;
    Check::fault(
        "kernel",
        format!("Linux {release} is too old"),
        format!("vramd needs {major}.{minor} or newer"),
    )
}

fn memory(meminfo: &str) -> Check {
    let (Some(total), Some(available)) =
        (meminfo_bytes(meminfo, "MemTotal"), meminfo_bytes(meminfo, "MemAvailable"))
    else {
        return Check::fault("memory", "/proc/meminfo cannot be read", "mount /proc");
    };
    super::memory(available, total)
}

/// The tightest memory limit of the groups above this process.
fn control_group(root: &Path, groups: &str) -> Check {
    const NAME: &str = "cgroup";
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|it| it == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let below = Path::new(path.trim_start_matches('/'));
        let limits = below.ancestors().filter_map(|group| {
            let text = std::fs::read_to_string(root.join(mount).join(group).join(file)).ok()?;
            text.trim().parse::<u64>().ok()
        });
        limits.min()
    });
    // Version 1 writes "no limit" as the largest multiple of a page.
    match limits.min().filter(|limit| *limit < 1 << 62) {
        Some(limit) if limit < LEAST_MEMORY => Check::warning(
            NAME,
            format!("this process may use {} only", Bytes::show(limit)),
            "raise memory.max of its group (systemd: MemoryMax=)",
        ),
        Some(limit) => Check::ok(NAME, format!("this process may use {}", Bytes::show(limit))),
        None => Check::ok(NAME, "no memory limit"),
    }
}

fn huge_pages(setting: Option<&str>, pool: u64) -> Check {
    const NAME: &str = "huge pages";
    let active = setting.and_then(|text| text.split_once('[')?.1.split_once(']')).map(|(word, _)| word);
    let cost = "loading and first touch are slower without huge pages";
    match active {
        Some(word @ ("always" | "within_size" | "advise" | "force")) => {
            Check::ok(NAME, format!("on for shared memory ({word})"))
        }
        _ if pool > 0 => {
            Check::ok(NAME, format!("off for shared memory, with a pool of {pool} of them instead"))
        }
        Some(word) => Check::warning(
            NAME,
            format!("off for shared memory ({word}): {cost}"),
            format!("as root: echo advise > /{HUGE_PAGES}"),
        ),
        None => Check::warning(
            NAME,
            format!("this kernel has none for shared memory: {cost}"),
            "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE, or set vm.nr_hugepages",
        ),
    }
}

fn swap(meminfo: &str) -> Check {
    match meminfo_bytes(meminfo, "SwapTotal") {
        None | Some(0) => Check::ok("swap", "off"),
        Some(bytes) => Check::warning(
            "swap",
            format!("{} of swap: the kernel may swap model memory out", Bytes::show(bytes)),
            "swapoff -a, or MemorySwapMax=0 for the service",
        ),
    }
}

/// The daemon locks nothing; a worker that pins what it attached for a GPU does.
fn locked_memory(limits: &str) -> Check {
    let message = match limit(limits, "Max locked memory") {
        Some(bytes) => format!("a worker may lock {}; vramd itself locks none", Bytes::show(bytes)),
        None => "no limit".to_owned(),
    };
    Check::ok("locked memory", message)
}

fn open_files(limits: &str) -> Check {
    match limit(limits, "Max open files") {
        Some(files) if files < OPEN_FILES => Check::warning(
            "open files",
            format!("at most {files}: each segment and each connection takes one"),
            format!("ulimit -Hn {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} for the service"),
        ),
        Some(files) => Check::ok("open files", format!("up to {files}")),
        None => Check::ok("open files", "no limit"),
    }
}

fn pressure(readable: bool) -> Check {
    if readable {
        return Check::ok("pressure", "the kernel reports memory pressure");
    }
    Check::warning(
        "pressure",
        "the kernel does not report memory pressure: it is seen later",
        "boot with psi=1 on a kernel with CONFIG_PSI",
    )
}

/// A hard limit of `/proc/self/limits`; nothing means that there is none.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn meminfo_value(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn meminfo_bytes(meminfo: &str, name: &str) -> Option<u64> {
    meminfo_value(meminfo, name).map(|kibibytes| kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let tree = tempfile::tempdir().expect("a directory");
        for (path, text) in files {
            let path = tree.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            std::fs::write(path, text).expect("a file");
        }
        tree
    }

    fn verdict(checks: &[Check], name: &str) -> Verdict {
        checks.iter().find(|check| check.name == name).expect("such a check").verdict
    }

    #[test]
    fn a_good_machine_has_no_warning() {
        let tree = tree(&[
            ("proc/sys/kernel/osrelease", "6.1.0-18-amd64\n"),
            ("proc/meminfo", "MemTotal: 65536000 kB\nMemAvailable: 60000000 kB\nSwapTotal: 0 kB\n"),
            (
                "proc/self/limits",
                "Max open files            1024                 1048576              files\n",
            ),
            ("proc/self/cgroup", "0::/system.slice/vramd.service\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "max\n"),
            ("proc/pressure/memory", "some avg10=0.00\n"),
            (HUGE_PAGES, "always within_size [advise] never deny force\n"),
        ]);
        for check in checks_of(tree.path()) {
            assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
        }
    }

    #[test]
    fn each_shortcoming_is_found() {
        let tree = tree(&[
            ("proc/sys/kernel/osrelease", "5.10.0\n"),
            ("proc/meminfo", "MemTotal: 65536000 kB\nMemAvailable: 1000 kB\nSwapTotal: 8 kB\n"),
            ("proc/self/limits", "Max open files            1024                 1024              files\n"),
            ("proc/self/cgroup", "4:memory:/docker/abc\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n"),
            (HUGE_PAGES, "always within_size advise [never] deny force\n"),
        ]);
        let checks = checks_of(tree.path());
        assert_eq!(verdict(&checks, "kernel"), Verdict::Fault);
        for name in ["memory", "cgroup", "huge pages", "swap", "open files", "pressure"] {
            assert_eq!(verdict(&checks, name), Verdict::Warning, "{name}");
        }
    }

    #[test]
    fn the_tightest_group_counts() {
        let tree = tree(&[
            ("sys/fs/cgroup/a/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/a/b/memory.max", "2147483648\n"),
        ]);
        let check = control_group(tree.path(), "0::/a/b\n");
        assert_eq!(check, Check::ok("cgroup", "this process may use 1.0 GiB"));
    }

    #[test]
    fn a_pool_of_huge_pages_will_do() {
        assert_eq!(huge_pages(Some("[never]"), 512).verdict, Verdict::Ok);
        assert_eq!(huge_pages(None, 0).verdict, Verdict::Warning);
    }
}
