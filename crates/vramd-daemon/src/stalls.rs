//! Tasks that wait for memory: the system tells (Linux's pressure stall information), nobody asks again and again.

#[cfg(target_os = "linux")]
pub use linux::watch;
#[cfg(not(target_os = "linux"))]
pub use none::watch;

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io::{self, Write as _};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use tokio_util::sync::CancellationToken;
    use vramd_core::pressure::Stall;

    use crate::driver::{Driver, Event};

    const FILE: &str = "/proc/pressure/memory";
    /// So many microseconds of two seconds; ordinary users may have windows of whole two seconds alone.
    const SOME: &str = "some 150000 2000000\0";
    const FULL: &str = "full 100000 2000000\0";
    /// How often the end is looked for.
    const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

    /// Tells the driver of stalls until the daemon stops.
    pub fn watch(driver: Driver, stopping: CancellationToken) {
        let triggers = match trigger(SOME).and_then(|some| Ok([some, trigger(FULL)?])) {
            Ok(triggers) => triggers,
            Err(error) => {
                tracing::info!(%error, "stalls for memory are not told: only figures count");
                return;
            }
        };
        let wait = move || {
            while !stopping.is_cancelled() {
                let mut fds =
                    [PollFd::new(&triggers[0], PollFlags::PRI), PollFd::new(&triggers[1], PollFlags::PRI)];
                match poll(&mut fds, Some(&LOOK)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        tracing::warn!(%error, "stalls for memory are told no more");
                        return;
                    }
                }
                if fds.iter().any(|fd| fd.revents().contains(PollFlags::ERR)) {
                    return;
                }
                let told = |at: usize| fds[at].revents().contains(PollFlags::PRI);
                let stall = if told(1) {
                    Stall::Full
                } else if told(0) {
                    Stall::Some
                } else {
                    continue;
                };
                driver.tell_blocking(Event::Stalled(stall));
            }
        };
        if let Err(error) = std::thread::Builder::new().name("stalls".to_owned()).spawn(wait) {
            tracing::warn!(%error, "stalls for memory are not told");
        }
    }

    fn trigger(text: &str) -> io::Result<File> {
        let mut file = File::options().read(true).write(true).open(FILE)?;
        file.write_all(text.as_bytes())?;
        Ok(file)
    }
}

#[cfg(not(target_os = "linux"))]
mod none {
    use tokio_util::sync::CancellationToken;

    use crate::driver::Driver;

    /// Nothing tells here.
    pub fn watch(_driver: Driver, _stopping: CancellationToken) {}
}
