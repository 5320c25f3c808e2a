//! `vramd serve`.

use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::config;
use crate::arguments::ServeArguments;
use crate::error::CommandError;
use crate::output::Output;
use crate::system;

/// How long a thread for blocking work stays when there is none.
const KEEP_ALIVE: Duration = Duration::from_millis(500);

pub fn serve(arguments: ServeArguments, output: Output) -> Result<(), CommandError> {
    let settings = config::resolved(arguments)?;
    let filter = EnvFilter::try_new(&settings.log.value).map_err(|error| CommandError::Usage {
        message: format!("{:?} is not a log filter ({}): {error}", settings.log.value, settings.log.origin),
        hint: "write a level such as info, or a filter such as info,vramd_daemon=debug".to_owned(),
    })?;
    log(filter, output);
    if output.json {
        config::print(&settings, output)?;
    }
    system::raise_open_files();
    let config = settings.daemon()?;
    // Each measurement wakes a thread that waits for blocking work: with the usual ten seconds, none of those that a
    // burst began would ever end.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_keep_alive(KEEP_ALIVE).build()?;
    let outcome = runtime.block_on(async {
        let shutdown = system::shutdown()?;
        Ok(vramd_daemon::serve(config, shutdown).await?)
    });
    // A device call or a read that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

fn log(filter: EnvFilter, output: Output) {
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output.color_stderr())
        .init();
}

/// `vramd loader`.
#[cfg(unix)]
pub fn load(library: &std::path::Path, card: &str, output: Output) -> Result<(), CommandError> {
    use tokio::signal::unix::{SignalKind, signal};
    log(EnvFilter::new("info"), output);
    // A service manager signals all processes of a service: this one ends when its daemon has.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let heard = {
        let _here = runtime.enter();
        [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal)
    };
    // The standard input stays the caller's: this is a descriptor of our own.
    let control = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).map_err(std::io::Error::from)?;
    let served = vramd_daemon::serve_loader(library, card, &control);
    drop(heard);
    if let Err(error) = served {
        return Err(CommandError::Usage {
            message: format!("this is no loader of a daemon's: {error}"),
            hint: "`vramd serve` starts loaders by itself".to_owned(),
        });
    }
    Ok(())
}
