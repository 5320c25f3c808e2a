//! What vramd is measured with: `bare` serves what it serves and `hammer` asks both; `reader` has memory attached that
//! is moved, and `copier` copies as much; `vulkan` is a bare program that copies on a card, or imports what is on it;
//! `sim` is vramd itself, on a simulated device that others fill.

mod bare;
mod copier;
mod hammer;
mod reader;
mod sim;
mod vulkan;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use vramd_api::Bytes;

/// What vramd is measured with
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
    /// Holds allocations attached and mapped until its input ends; prints what it noticed of moves as JSON
    Reader {
        socket: PathBuf,
        allocations: Vec<String>,
        /// Reads all the while
        #[arg(long)]
        busy: bool,
    },
    /// Copies between two buffers of a Vulkan adapter and prints the rates as JSON
    Vulkan {
        ordinal: usize,
        #[arg(long)]
        bytes: Bytes,
        #[arg(long, default_value_t = 7)]
        rounds: usize,
    },
    /// Copies from one Vulkan adapter to another by way of host memory, one step after the other
    VulkanBetween {
        from: usize,
        to: usize,
        #[arg(long)]
        bytes: Bytes,
        #[arg(long, default_value_t = 7)]
        rounds: usize,
    },
    /// Has allocations of a Vulkan adapter handed out, imports them and prints the milliseconds as JSON
    VulkanAttach {
        ordinal: usize,
        socket: PathBuf,
        allocations: Vec<String>,
        #[arg(long, default_value_t = 7)]
        rounds: usize,
    },
    /// Sends messages of a kilobyte to a Python worker, and to programs that only echo, in turns; prints what that took as JSON
    Worker {
        python: PathBuf,
        /// Where the programs run; this one should not
        #[arg(long)]
        processor: usize,
        #[arg(long, default_value_t = 2000)]
        messages: usize,
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Serves vramd on a simulated device until its input ends; `foreign BYTES` and `process PID BYTES` there say what others have of it
    Sim(sim::Options),
    /// Copies memory and prints the rate as JSON
    Copier {
        #[arg(long)]
        block: Bytes,
        #[arg(long)]
        total: Bytes,
        #[arg(long)]
        threads: usize,
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
        Command::Reader { socket, allocations, busy } => {
            println!("{}", reader::run(&socket, &allocations, busy)?);
            Ok(())
        }
        Command::Vulkan { ordinal, bytes, rounds } => {
            println!("{}", vulkan::run(ordinal, bytes, rounds)?);
            Ok(())
        }
        Command::VulkanBetween { from, to, bytes, rounds } => {
            println!("{}", vulkan::run_between(from, to, bytes, rounds)?);
            Ok(())
        }
        Command::VulkanAttach { ordinal, socket, allocations, rounds } => {
            println!("{}", vulkan::run_attach(ordinal, &socket, &allocations, rounds)?);
            Ok(())
        }
        Command::Worker { python, processor, messages, rounds } => {
            // Where the daemon's own callers are: on the runtime's threads.
            let run = tokio::spawn(async move { worker::run(&python, processor, messages, rounds).await });
            println!("{}", run.await??);
            Ok(())
        }
        Command::Sim(options) => sim::serve(options).await,
        Command::Copier { block, total, threads } => {
            println!("{}", copier::run(block, total, threads));
            Ok(())
        }
    }
}
