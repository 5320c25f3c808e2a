//! The places that the settings name: address, socket, store, model roots.

use std::io;
use std::net::TcpListener;
use std::path::Path;

use vramd_api::Bytes;

use super::Check;
use crate::settings::{Settings, Switch};
use crate::system;
use vramd_daemon::{Adapters, CudaCards};

/// The store is small; below this it will soon refuse.
const STORE_ROOM: u64 = 64 << 20;

/// `serving` says that a daemon answers already, which then holds the address.
pub fn checks(settings: Settings, serving: bool) -> io::Result<Vec<Check>> {
    let mut checks = Vec::new();
    let listen = settings.listen.value.clone();
    // What each system has for cards, and what both have.
    if cfg!(windows) {
        checks.push(d3d12(settings.d3d12.value, &vramd_daemon::d3d12_adapters()));
        checks.push(directml(vramd_daemon::directml()));
    } else {
        checks.push(cuda(settings.cuda.value, &vramd_daemon::cuda_cards(), has_nvidia_card(Path::new("/"))));
    }
    checks.push(vulkan(settings.vulkan.value, &vramd_daemon::vulkan_adapters()));
    let config = settings.daemon()?;
    if let (Switch::On(address), false) = (listen, serving) {
        checks.push(match TcpListener::bind(address) {
            Ok(_) => Check::ok("address", format!("{address} is free")),
            Err(error) => Check::fault(
                "address",
                format!("nothing can be served on {address}: {error}"),
                "--listen takes another address, or none",
            ),
        });
    }
    // A pipe is in no directory.
    if let Some(path) = config.socket.filter(|_| cfg!(unix)) {
        let directory = path.parent().unwrap_or(Path::new("/"));
        checks.push(writable("socket", directory, "--socket"));
    }
    checks.push(writable("store", &config.state_dir, "--state-dir"));
    checks.extend(room(&config.state_dir));
    if config.model_roots.is_empty() {
        checks.push(Check::warning(
            "model root",
            "none: no model can be registered",
            "--model-root or model_roots names directories that models may lie in",
        ));
    }
    for root in &config.model_roots {
        let shown = root.display();
        checks.push(if !root.is_dir() {
            Check::fault("model root", format!("{shown} is no directory"), "create it, or name another")
        } else if let Err(error) = system::can_read(root) {
            Check::fault(
                "model root",
                format!("{shown} cannot be read: {error}"),
                "give this user the right to",
            )
        } else {
            Check::ok("model root", shown.to_string())
        });
    }
    Ok(checks)
}

/// The cards that CUDA may use; `there` says that the machine has one, whatever its driver says.
fn cuda(wanted: CudaCards, found: &Result<Vec<String>, String>, there: bool) -> Check {
    match (wanted, found) {
        (CudaCards::All, Ok(cards)) if !cards.is_empty() => Check::ok("CUDA", cards.join(", ")),
        (CudaCards::None, _) => Check::ok("CUDA", "not opened, by --cuda none"),
        (CudaCards::All, Ok(_)) if there => Check::warning(
            "CUDA",
            "there is an NVIDIA card, but CUDA may use none",
            "look at CUDA_VISIBLE_DEVICES and at `nvidia-smi -L`",
        ),
        (CudaCards::All, Err(error)) if there => Check::warning(
            "CUDA",
            format!("there is an NVIDIA card, but {error}"),
            "install NVIDIA's driver, and in a container pass the card in; `nvidia-smi` has to work for this user",
        ),
        (CudaCards::All, _) => Check::ok("CUDA", "no NVIDIA card"),
    }
}

/// Whether the PCI bus has a display controller of NVIDIA's.
fn has_nvidia_card(root: &Path) -> bool {
    let devices = std::fs::read_dir(root.join("sys/bus/pci/devices")).into_iter().flatten().flatten();
    devices.map(|device| device.path()).any(|device| {
        let starts = |file: &str, with: &str| {
            std::fs::read_to_string(device.join(file)).is_ok_and(|text| text.starts_with(with))
        };
        starts("vendor", "0x10de") && starts("class", "0x03")
    })
}

/// The drivers that are there, held against what the settings want.
fn vulkan(wanted: Adapters, found: &Result<Vec<(String, bool)>, String>) -> Check {
    let hint = "the card's driver brings it; on Debian: `apt install libvulkan1 mesa-vulkan-drivers`";
    let (cards, names) = match found {
        Ok(adapters) => {
            let of = |(name, card): &(String, bool)| match card {
                true => name.clone(),
                false => format!("{name} (software)"),
            };
            (
                adapters.iter().filter(|(_, card)| *card).count(),
                adapters.iter().map(of).collect::<Vec<_>>().join(", "),
            )
        }
        Err(error) => (0, error.clone()),
    };
    match (wanted, found) {
        (Adapters::All, Ok(all)) if !all.is_empty() => Check::ok("Vulkan", names),
        (Adapters::Hardware, _) if cards > 0 => Check::ok("Vulkan", names),
        (Adapters::None, Ok(all)) if !all.is_empty() => {
            Check::ok("Vulkan", format!("{names}; not opened without --vulkan"))
        }
        (Adapters::None, _) => Check::ok("Vulkan", format!("no adapter ({names})")),
        (Adapters::Hardware, Ok(all)) if !all.is_empty() => {
            Check::warning("Vulkan", format!("no card: {names}"), "--vulkan all opens software drivers too")
        }
        _ => Check::warning("Vulkan", format!("no adapter ({names})"), hint),
    }
}

fn d3d12(wanted: Adapters, found: &Result<Vec<(String, bool)>, String>) -> Check {
    const NAME: &str = "Direct3D 12";
    let usable = |all: &[(String, bool)]| {
        let mut names = Vec::new();
        names.extend(
            all.iter().filter(|(_, card)| *card || wanted == Adapters::All).map(|(name, _)| name.clone()),
        );
        names.join(", ")
    };
    match (wanted, found.as_deref().map(usable)) {
        (Adapters::None, _) => Check::ok(NAME, "not opened, by --d3d12 none"),
        (_, Ok(names)) if !names.is_empty() => Check::ok(NAME, names),
        (_, Ok(_)) => Check::ok(NAME, "no card"),
        (_, Err(error)) => Check::warning(NAME, error.clone(), "install the card's driver"),
    }
}

/// The daemon does without; workers may not.
fn directml(found: Result<Vec<String>, String>) -> Check {
    const NAME: &str = "DirectML";
    match found {
        Ok(cards) if !cards.is_empty() => Check::ok(NAME, format!("works on {}", cards.join(", "))),
        Ok(_) => Check::ok(NAME, "no card"),
        Err(reason) => {
            Check::ok(NAME, format!("not of this system ({reason}); programs that need it bring it along"))
        }
    }
}

/// Whether files can be made in `directory`, or it can itself be made.
fn writable(name: &'static str, directory: &Path, flag: &str) -> Check {
    let existing = existing(directory);
    match system::can_write(existing) {
        Err(error) => Check::fault(
            name,
            format!("{} cannot be written: {error}", existing.display()),
            format!("{flag} names another place"),
        ),
        Ok(()) if existing == directory => Check::ok(name, format!("{} can be written", directory.display())),
        Ok(()) => Check::ok(name, format!("{} can be made", directory.display())),
    }
}

fn room(directory: &Path) -> Option<Check> {
    let free = system::free_bytes(existing(directory))?;
    let message = format!("{} free in {}", Bytes::show(free), directory.display());
    Some(if free >= STORE_ROOM {
        Check::ok("store room", message)
    } else {
        Check::warning("store room", message, "a full disk makes the daemon refuse every change: make room")
    })
}

/// The deepest part of a path that is there already.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn what_cuda_lacks_is_said_only_where_there_is_a_card() {
        use super::super::Verdict::{Ok as Good, Warning};
        let broken = Err("the library is not there".to_owned());
        for (found, there, verdict) in [
            (Ok(vec!["Card".to_owned()]), true, Good),
            (Ok(Vec::new()), true, Warning),
            (broken.clone(), true, Warning),
            (broken, false, Good),
        ] {
            assert_eq!(cuda(CudaCards::All, &found, there).verdict, verdict, "{found:?}");
            assert_eq!(cuda(CudaCards::None, &found, there).verdict, Good);
        }
        let root = tempfile::tempdir().expect("a directory");
        assert!(!has_nvidia_card(root.path()));
        for (name, vendor, class, is_card) in [
            ("0000:00:01.0", "0x8086", "0x030000", false),
            ("0000:00:02.0", "0x10de", "0x040300", false),
            ("0000:00:03.0", "0x10de", "0x030200", true),
        ] {
            let device = root.path().join("sys/bus/pci/devices").join(name);
            std::fs::create_dir_all(&device).expect("a directory");
            std::fs::write(device.join("vendor"), format!("{vendor}\n")).expect("written");
            std::fs::write(device.join("class"), format!("{class}\n")).expect("written");
            assert_eq!(has_nvidia_card(root.path()), is_card, "{name}");
        }
    }

    #[test]
    fn what_vulkan_lacks_is_said_only_to_who_wants_it() {
        use super::super::Verdict::{Ok as Good, Warning};
        let card = ("Card".to_owned(), true);
        let software = ("llvmpipe".to_owned(), false);
        let none = || Err("the loader is not there".to_owned());
        for (found, verdicts) in [
            (Ok(vec![card.clone(), software.clone()]), [Good, Good, Good]),
            (Ok(vec![software]), [Good, Warning, Good]),
            (Ok(Vec::new()), [Good, Warning, Warning]),
            (none(), [Good, Warning, Warning]),
        ] {
            let wanted = [Adapters::None, Adapters::Hardware, Adapters::All];
            assert_eq!(wanted.map(|wanted| vulkan(wanted, &found).verdict), verdicts, "{found:?}");
        }
        assert!(vulkan(Adapters::All, &none()).message.contains("the loader is not there"));
    }

    #[test]
    fn a_directory_that_can_be_made_is_good() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a/b");
        assert_eq!(writable("store", &path, "--state-dir").verdict, Verdict::Ok);
        assert_eq!(existing(&path), dir.path());
    }

    #[test]
    fn a_file_in_the_way_is_a_fault() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("a file");
        assert_eq!(writable("store", &file.join("state"), "--state-dir").verdict, Verdict::Fault);
    }
}
