//! What a worker's processes may take of host memory: by a control group where we may make one, else by a limit of each process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use vramd_api::{LimitKind, WorkerLimit};

/// How our control groups begin.
const PREFIX: &str = "vramd-worker-";
/// How often processes that are to end are looked for: some fork meanwhile.
pub const ROUNDS: usize = 8;

#[derive(Debug)]
pub struct Limits {
    group: Option<PathBuf>,
    /// How many processes the system had ended for it before: a group may have been another run's.
    kills_before: u64,
    shown: Option<WorkerLimit>,
}

impl Limits {
    /// Limits a process and all that it starts from now on.
    pub fn set(bytes: Option<u64>, process: Pid, id: &str) -> Self {
        let Some(bytes) = bytes else { return Self { group: None, kills_before: 0, shown: None } };
        let why = match make_group(bytes, process, id) {
            Ok(group) => {
                let shown = WorkerLimit { kind: LimitKind::ControlGroup, bytes, note: None };
                return Self { kills_before: kills(&group), group: Some(group), shown: Some(shown) };
            }
            Err(error) => format!("no control group could be made: {error}"),
        };
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        let (kind, note) = match prlimit(Some(process), Resource::Data, limit) {
            Ok(_) => (LimitKind::DataSegment, why),
            Err(error) => (LimitKind::None, format!("{why}; RLIMIT_DATA: {error}")),
        };
        Self { group: None, kills_before: 0, shown: Some(WorkerLimit { kind, bytes, note: Some(note) }) }
    }

    pub fn shown(&self) -> Option<WorkerLimit> {
        self.shown.clone()
    }

    /// The limit, if the system ended one of its processes for it.
    pub fn reached(&self) -> Option<u64> {
        let has_more = kills(self.group.as_ref()?) > self.kills_before;
        self.shown.as_ref().filter(|_| has_more).map(|limit| limit.bytes)
    }

    /// Ends whatever is in the control group, whichever process group it chose.
    pub fn kill(&self) {
        if let Some(group) = &self.group {
            kill_all(group);
        }
    }

    /// Removes the control group, once its processes are gone.
    pub fn end(&mut self) {
        if let Some(group) = self.group.take() {
            end_group(&group);
        }
    }
}

/// How many processes of a group the system has ended for its limit.
fn kills(group: &Path) -> u64 {
    // Of version 2 and of version 1.
    let told = ["memory.events", "memory.oom_control"];
    let text: String = told.iter().filter_map(|file| fs::read_to_string(group.join(file)).ok()).collect();
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
    count.unwrap_or(0)
}

/// Removes what earlier runs of this daemon left. Before any worker is started: a group with processes in it is not divided.
pub fn sweep(mark: &str) {
    let Some((own, _)) = own_group(Path::new("/"), is_delegated) else { return };
    let prefix = format!("{PREFIX}{mark}-");
    let entries = fs::read_dir(own).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)) {
        end_group(&entry.path());
    }
}

/// Those that fork meanwhile are met the next time round.
fn kill_all(group: &Path) {
    for _ in 0..ROUNDS {
        let listed = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        if listed.is_empty() {
            return;
        }
        for process in listed.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        }
    }
}

fn end_group(group: &Path) {
    kill_all(group);
    // One that still has a process in it, dead but not waited for, is taken over by the next start, or swept by the next run.
    if let Err(error) = fs::remove_dir(group) {
        tracing::debug!(group = %group.display(), %error, "a control group stays for now");
    }
}

fn make_group(bytes: u64, process: Pid, id: &str) -> io::Result<PathBuf> {
    let (own, limit) = own_group(Path::new("/"), is_delegated).ok_or_else(|| {
        io::Error::other("no group that divides memory is the daemon's own (of systemd: Delegate=memory)")
    })?;
    let group = own.join(format!("{PREFIX}{id}"));
    match fs::create_dir(&group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let made = fs::write(group.join(limit), bytes.to_string())
        .and_then(|()| fs::write(group.join("cgroup.procs"), process.as_raw_nonzero().to_string()));
    if let Err(error) = made {
        let _ = fs::remove_dir(&group);
        return Err(error);
    }
    Ok(group)
}

/// The folder in which groups for workers are made, and the name of the file with their limit.
fn own_group(root: &Path, is_delegated: impl Fn(&Path) -> bool) -> Option<(PathBuf, &'static str)> {
    let listed = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let place = |line: &str, controller: &str| -> Option<String> {
        let mut fields = line.splitn(3, ':').skip(1);
        let listed = fields.next()?.split(',').any(|one| one == controller);
        listed.then(|| fields.next().unwrap_or_default().trim_start_matches('/').to_owned())
    };
    let folder = |kind: &str, at: String| {
        // In a container the path may be that of the host: what is mounted is then the group itself.
        let base = root.join("sys/fs/cgroup").join(kind);
        let own = base.join(&at);
        if own.is_dir() { own } else { base }
    };
    if let Some(at) = listed.lines().find_map(|line| place(line, "memory")) {
        return Some((folder("memory", at), "memory.limit_in_bytes")).filter(|(at, _)| at.is_dir());
    }
    let own = folder("", listed.lines().find_map(|line| place(line, ""))?);
    let above = own.parent().filter(|above| is_delegated(above) && divides_memory(above));
    let found = match above {
        Some(above) => above.to_owned(),
        None if divides_memory(&own) || (is_delegated(&own) && divide(&own).is_ok()) => own,
        None => return None,
    };
    Some((found, "memory.max"))
}

/// Whether systemd has left the group to us, to be divided as we like: `Delegate=memory` in a unit.
fn is_delegated(group: &Path) -> bool {
    let mut value = [0; 1];
    rustix::fs::getxattr(group, "user.delegate", &mut value[..]).is_ok() && value == *b"1"
}

fn divides_memory(group: &Path) -> bool {
    let given = fs::read_to_string(group.join("cgroup.subtree_control")).unwrap_or_default();
    given.split_whitespace().any(|one| one == "memory")
}

/// A group divides memory among groups below it once no process is in it: this one goes below itself.
fn divide(group: &Path) -> io::Result<()> {
    let (leaf, pid) = (group.join("vramd"), std::process::id().to_string());
    match fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::write(leaf.join("cgroup.procs"), &pid)?;
    fs::write(group.join("cgroup.subtree_control"), "+memory").inspect_err(|error| {
        tracing::debug!(group = %group.display(), %error, "workers have no control groups");
        let _ = fs::write(group.join("cgroup.procs"), &pid);
        let _ = fs::remove_dir(&leaf);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "sys/fs/cgroup/system.slice/vramd.service";

    fn tree(group: &str, given: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        fs::write(root.path().join("proc/self/cgroup"), format!("0::{group}\n")).unwrap();
        fs::create_dir_all(root.path().join(OWN)).unwrap();
        fs::write(root.path().join(OWN).join("cgroup.subtree_control"), given).unwrap();
        root
    }

    #[test]
    fn what_is_delegated_is_divided_from_below() {
        let root = tree("/system.slice/vramd.service", "");
        let own = root.path().join(OWN);
        assert_eq!(own_group(root.path(), |_| false), None, "it is somebody else's to divide");
        assert!(!own.join("vramd").exists());
        assert_eq!(own_group(root.path(), |at| at == own), Some((own.clone(), "memory.max")));
        let written = |name: &str| fs::read_to_string(own.join(name)).unwrap();
        assert_eq!(written("vramd/cgroup.procs"), std::process::id().to_string());
        assert_eq!(written("cgroup.subtree_control"), "+memory");
    }

    #[test]
    fn who_is_below_already_makes_groups_beside_itself() {
        let root = tree("/system.slice/vramd.service/vramd", "cpu memory\n");
        let own = root.path().join(OWN);
        fs::create_dir(own.join("vramd")).unwrap();
        assert_eq!(own_group(root.path(), |at| at == own), Some((own.clone(), "memory.max")));
        assert!(!own.join("vramd/vramd").exists());
    }

    #[test]
    fn a_group_that_cannot_be_divided_stays_as_it_was() {
        let root = tree("/system.slice/vramd.service", "");
        let own = root.path().join(OWN);
        fs::remove_file(own.join("cgroup.subtree_control")).unwrap();
        fs::create_dir(own.join("cgroup.subtree_control")).unwrap();
        assert_eq!(own_group(root.path(), |at| at == own), None);
        let back = fs::read_to_string(own.join("cgroup.procs")).unwrap();
        assert_eq!(back, std::process::id().to_string());
    }
}
