//! The two sides of the HTTP comparison: `bare` serves, `hammer` asks.

mod bare;
mod hammer;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;

/// What vramd's HTTP side is measured with
#[derive(Debug, Parser)]
enum Command {
    /// Serves the paths that are measured, each with a fixed body, until it is killed; prints its address
    Bare {
        /// The answer to GET /api/memory/status
        #[arg(long)]
        status: PathBuf,
        /// The answer to POST /api/memory/allocations/allocate/DEVICE, of which it reads the body as vramd does
        #[arg(long)]
        allocated: PathBuf,
        /// The answer to DELETE /api/memory/allocations/ID
        #[arg(long)]
        released: PathBuf,
    },
    /// Keeps a server busy and prints requests per second and latencies as JSON
    Hammer {
        address: SocketAddr,
        #[arg(long, default_value_t = 64)]
        connections: usize,
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Allocates on this device and releases, in turn; without it, asks for the status
        #[arg(long)]
        allocate_on: Option<String>,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Bare { status, allocated, released } => bare::serve(&status, &allocated, &released).await,
        Command::Hammer { address, connections, seconds, allocate_on } => {
            let report = hammer::run(address, connections, seconds, allocate_on.as_deref()).await?;
            println!("{report}");
            Ok(())
        }
    }
}
