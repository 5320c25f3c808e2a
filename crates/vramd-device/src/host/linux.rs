//! Reads `/proc`, `/sys` and `/etc` below a root, which tests replace by a made-up tree. Knows the limits of the
//! control groups (versions 1 and 2) that this process is in, since a container's machine is its group.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Call, DeviceError};

/// The memory of the machine, as far as this process may use it.
#[derive(Debug)]
pub(crate) struct Host {
    root: PathBuf,
    groups: Vec<Group>,
    total_bytes: u64,
}

/// One control group that limits our memory: our own or one above it.
#[derive(Debug)]
struct Group {
    folder: PathBuf,
    names: &'static GroupFiles,
}

/// How the two versions of the interface name the same three things.
#[derive(Debug)]
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// A line of `memory.stat`: file pages that the kernel drops before it refuses memory.
    reclaimable: &'static str,
}

const VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const VERSION_2: GroupFiles =
    GroupFiles { limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file" };

impl Host {
    pub(crate) fn probe() -> Result<Self, DeviceError> {
        Self::at(Path::new("/")).map_err(|source| DeviceError::Native {
            call: Call::Sample,
            native: "read /proc/meminfo",
            source,
        })
    }

    pub(crate) fn at(root: &Path) -> io::Result<Self> {
        let groups = groups_of_this_process(root);
        let machine = meminfo(root, "MemTotal")?;
        let total_bytes = groups.iter().filter_map(Group::limit).fold(machine, u64::min);
        Ok(Self { root: root.to_owned(), groups, total_bytes })
    }

    /// The machine's memory, or the smallest limit that a control group sets, as they were when we opened.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// What the machine and its control groups would give now, the headroom included.
    pub(crate) fn free_bytes(&self) -> Result<u64, DeviceError> {
        let machine = meminfo(&self.root, "MemAvailable").map_err(|source| DeviceError::Native {
            call: Call::Sample,
            native: "read /proc/meminfo",
            source,
        })?;
        Ok(self.groups.iter().filter_map(Group::room).fold(machine, u64::min))
    }

    /// Huge pages that are set aside, in no use and promised to nobody, in bytes.
    pub(crate) fn free_huge_page_bytes(&self) -> u64 {
        let count = |name| meminfo_count(&self.root, name).unwrap_or(0);
        let pages = count("HugePages_Free").saturating_sub(count("HugePages_Rsvd"));
        pages * meminfo(&self.root, "Hugepagesize").unwrap_or(0)
    }

    /// The memory that processes share with nobody, in RAM.
    ///
    /// One that was forked, and runs the same program since, shares with its parent what neither has written to: of both, the share
    /// of each counts, which takes the system some 17 ms for each GiB.
    pub(crate) fn private_bytes(&self, pids: &[u32]) -> BTreeMap<u32, u64> {
        let mut all: BTreeMap<u32, (u64, u32)> =
            pids.iter().filter_map(|pid| Some((*pid, self.anonymous_bytes(*pid)?))).collect();
        let forked = all.iter().filter(|(pid, (_, parent))| {
            self.start_of_stack(**pid).is_some_and(|start| self.start_of_stack(*parent) == Some(start))
        });
        let sharing: BTreeSet<u32> = forked.flat_map(|(pid, (_, parent))| [*pid, *parent]).collect();
        for pid in sharing {
            if let (Some(share), Some(of)) = (self.share_of_anonymous_bytes(pid), all.get_mut(&pid)) {
                of.0 = share;
            }
        }
        all.into_iter().map(|(pid, (bytes, _))| (pid, bytes)).collect()
    }

    /// A process's memory that is of no file, in RAM, and who started it.
    fn anonymous_bytes(&self, pid: u32) -> Option<(u64, u32)> {
        let status = self.text(&format!("proc/{pid}/status"))?;
        let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let kibibytes: u64 = value("RssAnon:")?.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        Some((kibibytes.checked_mul(1024)?, value("PPid:")?.trim().parse().ok()?))
    }

    /// The same, with its share alone of what it has in common with others.
    fn share_of_anonymous_bytes(&self, pid: u32) -> Option<u64> {
        let rolled_up = self.text(&format!("proc/{pid}/smaps_rollup"))?;
        let line = rolled_up.lines().find_map(|line| line.strip_prefix("Pss_Anon:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    /// Where a process's stack begins: anew for each program that is started, and as before in what is only forked. Who may not
    /// know is told 0.
    fn start_of_stack(&self, pid: u32) -> Option<u64> {
        let stat = self.text(&format!("proc/{pid}/stat"))?;
        // Its name, in brackets, may hold anything; after it come the third field and those that follow.
        stat.rsplit_once(") ")?.1.split(' ').nth(28 - 3)?.parse().ok().filter(|start| *start > 0)
    }

    /// A text file below the root, trimmed; nothing when it cannot be read or is empty.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// `host-<machine id>`, or `host-named-<host name>` where the machine has no id, as in many containers.
    pub(crate) fn uuid(&self) -> String {
        let id = self.text("etc/machine-id").or_else(|| self.text("var/lib/dbus/machine-id"));
        match id.filter(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())) {
            Some(id) => format!("host-{id}"),
            None => format!(
                "host-named-{}",
                self.text("proc/sys/kernel/hostname").unwrap_or_else(|| "localhost".to_owned())
            ),
        }
    }

    /// The processor's name for people.
    pub(crate) fn processor(&self) -> Option<String> {
        let text = self.text("proc/cpuinfo")?;
        let (_, name) = text
            .lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == "model name"))?;
        Some(name.split_whitespace().collect::<Vec<_>>().join(" ")).filter(|name| !name.is_empty())
    }
}

impl Group {
    /// The limit in bytes; nothing when there is none (`max`).
    fn limit(&self) -> Option<u64> {
        number(&self.folder.join(self.names.limit))
    }

    fn room(&self) -> Option<u64> {
        let limit = self.limit().filter(|limit| *limit < NO_LIMIT)?;
        let usage = number(&self.folder.join(self.names.usage))?;
        let stat = fs::read_to_string(self.folder.join("memory.stat")).unwrap_or_default();
        let reclaimable = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(key, _)| *key == self.names.reclaimable)
            .and_then(|(_, value)| value.trim().parse().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
    }
}

/// Version 1 writes "no limit" as the largest multiple of the page size; nothing real comes near it.
const NO_LIMIT: u64 = 1 << 62;

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn meminfo(root: &Path, name: &str) -> io::Result<u64> {
    meminfo_count(root, name)?
        .checked_mul(1024)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a value in /proc/meminfo is too large"))
}

/// A value of `/proc/meminfo` as it stands there: kibibytes, or a count of pages.
fn meminfo_count(root: &Path, name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/meminfo has no {name}")))
}

/// Our own control group and all above it that we can see, wherever the hierarchy is mounted.
fn groups_of_this_process(root: &Path) -> Vec<Group> {
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let member = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut groups = Vec::new();
    for line in mounts.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else { continue };
        let mut mount = mount.split(' ').skip(3);
        let (Some(mounted_root), Some(mount_point)) = (mount.next(), mount.next()) else { continue };
        let mut file_system = file_system.split(' ');
        let (kind, options) = (file_system.next().unwrap_or(""), file_system.nth(1).unwrap_or(""));
        let (names, controller) = match kind {
            "cgroup2" => (&VERSION_2, ""),
            "cgroup" if options.split(',').any(|option| option == "memory") => (&VERSION_1, "memory"),
            _ => continue,
        };
        let own = member
            .lines()
            .filter_map(|line| line.split_once(':')?.1.split_once(':'))
            .find(|(controllers, _)| controllers.split(',').any(|name| name == controller))
            .map_or("/", |(_, path)| path);
        // In a container the hierarchy is often mounted from our own group on: then the paths do not match.
        let below = Path::new(own).strip_prefix(mounted_root).unwrap_or(Path::new(""));
        let mount_point = Path::new(mount_point);
        let top = root.join(mount_point.strip_prefix("/").unwrap_or(mount_point));
        let own = top.join(below);
        groups.extend(
            own.ancestors()
                .take_while(|folder| folder.starts_with(&top))
                .filter(|folder| folder.join(names.limit).exists())
                .map(|folder| Group { folder: folder.to_owned(), names }),
        );
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n\
                           HugePages_Free:      10\nHugePages_Rsvd:       3\nHugepagesize:       2048 kB\n";

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn what_processes_share_is_counted_once() {
        let status = |parent, kibibytes| format!("Name:\tx\nPPid:\t{parent}\nRssAnon:\t{kibibytes} kB\n");
        let stat = |stack| format!("1 (a) b) S {} {stack} 0", ["0"; 24].join(" "));
        let tree = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/10/status", &status(1, 1000)),
            ("proc/10/stat", &stat(77)),
            // Forked.
            ("proc/11/status", &status(10, 1200)),
            ("proc/11/stat", &stat(77)),
            ("proc/10/smaps_rollup", "Rss: 1100 kB\nPss: 800 kB\nPss_Anon:            600 kB\n"),
            ("proc/11/smaps_rollup", "Pss_Anon: 700 kB\n"),
            // Started.
            ("proc/12/status", &status(10, 300)),
            ("proc/12/stat", &stat(78)),
        ]);
        let host = Host::at(tree.path()).unwrap();
        let kibibytes = |pid: u32, count: u64| (pid, count << 10);
        let all = [kibibytes(10, 600), kibibytes(11, 700), kibibytes(12, 300)];
        assert_eq!(host.private_bytes(&[10, 11, 12, 13]), all.into());
        assert_eq!(host.private_bytes(&[11]), [kibibytes(11, 700)].into(), "its parent has the rest");
    }

    #[test]
    fn a_machine_without_limits_is_its_memory() {
        let tree = tree(&[("proc/meminfo", MEMINFO)]);
        let host = Host::at(tree.path()).unwrap();
        assert_eq!(host.total_bytes(), 16 << 30);
        assert_eq!(host.free_bytes().unwrap(), 8 << 30);
        assert_eq!(host.available_bytes().unwrap(), (8 << 30) - (16 << 30) / 50);
        assert_eq!(host.free_huge_page_bytes(), 14 << 20);
    }

    #[test]
    fn the_tightest_group_above_us_counts() {
        let tree = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/system.slice/vramd.service\n"),
            ("proc/self/mountinfo", "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "2147483648\n"),
            ("sys/fs/cgroup/system.slice/memory.current", "1073741824\n"),
            ("sys/fs/cgroup/system.slice/memory.stat", "anon 5\ninactive_file 4096\nactive_file 7\n"),
            ("sys/fs/cgroup/system.slice/vramd.service/memory.max", "max\n"),
            ("sys/fs/cgroup/system.slice/vramd.service/memory.current", "4096\n"),
        ]);
        let host = Host::at(tree.path()).unwrap();
        assert_eq!(host.total_bytes(), 2 << 30);
        assert_eq!(host.free_bytes().unwrap(), (1 << 30) + 4096);
    }

    #[test]
    fn a_container_that_sees_its_own_group_as_the_root_is_limited_by_it() {
        let tree = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"),
            (
                "proc/self/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "268435456\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 1048576\n"),
        ]);
        let host = Host::at(tree.path()).unwrap();
        assert_eq!(host.total_bytes(), 512 << 20);
        assert_eq!(host.free_bytes().unwrap(), 257 << 20);
        assert_eq!(host.headroom_bytes(), 64 << 20);
    }

    #[test]
    fn a_version_1_group_without_a_limit_is_no_limit() {
        let tree = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "4:memory:/a\n"),
            ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "4096\n"),
        ]);
        let host = Host::at(tree.path()).unwrap();
        assert_eq!((host.total_bytes(), host.free_bytes().unwrap()), (16 << 30, 8 << 30));
    }

    #[test]
    fn a_machine_keeps_its_uuid_and_falls_back_to_its_name() {
        let id = "3d1219c7c4c5404aaa1f6d2a48adfda4";
        let with_id = tree(&[("proc/meminfo", MEMINFO), ("etc/machine-id", &format!("{id}\n"))]);
        assert_eq!(Host::at(with_id.path()).unwrap().uuid(), format!("host-{id}"));
        let without = tree(&[
            ("proc/meminfo", MEMINFO),
            ("etc/machine-id", "uninitialized\n"),
            ("proc/sys/kernel/hostname", "box7\n"),
        ]);
        assert_eq!(Host::at(without.path()).unwrap().uuid(), "host-named-box7");
    }

    #[test]
    fn a_tree_without_meminfo_is_an_error() {
        let tree = tree(&[("etc/machine-id", "x")]);
        assert!(Host::at(tree.path()).is_err());
    }
}
