//! A daemon with host memory and one simulated device, `sim:0`, of which others take what they are told to take.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use vramd_api::{Bytes, EvictionPolicy, KeepAlive};
use vramd_daemon::{
    Adapters, Config, CudaCards, Devices, LoaderCommand, LocalTime, Programs, Thresholds, serve_on,
};
use vramd_device::{cpu, sim};

/// As of `vramd serve`, but for the size.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    state_dir: PathBuf,
    #[arg(long)]
    model_root: PathBuf,
    #[arg(long)]
    ready_file: PathBuf,
    /// Of the simulated device
    #[arg(long)]
    size: Bytes,
}

/// Serves until its input ends.
pub async fn serve(options: Options) -> anyhow::Result<()> {
    let host = cpu::Device::open(cpu::Options::default())?;
    let device = sim::Device::open(sim::Spec::new(0, options.size.get()))?;
    let faults = device.faults();
    let mut devices = Devices::default();
    devices.add(Arc::new(host), u64::MAX);
    devices.add(Arc::new(device), u64::MAX);
    let config = Config {
        listen: Some(options.listen),
        socket: Some(options.socket),
        state_dir: options.state_dir,
        model_roots: vec![options.model_root],
        cpu_limit_bytes: None,
        sim: None,
        cuda: CudaCards::None,
        vulkan: Adapters::None,
        d3d12: Adapters::None,
        loader: LoaderCommand { program: "none".into(), arguments: Vec::new() },
        quiet_hours: None,
        eviction: EvictionPolicy::default(),
        minimum_stay: KeepAlive::Seconds(0),
        page_pool_bytes: 0,
        ram_tier_bytes: None,
        ram_reserve_bytes: None,
        pressure_thresholds: Thresholds::default(),
        worker_programs: Programs::new(),
        workers: Vec::new(),
        bridges: Vec::new(),
        ready_file: Some(options.ready_file),
    };
    let input_ends = async move {
        let obeyed = tokio::task::spawn_blocking(move || obey(&faults)).await;
        if let Ok(Err(error)) = obeyed {
            eprintln!("{error:#}");
        }
    };
    Ok(serve_on(config, devices, LocalTime::system(), input_ends).await?)
}

fn obey(faults: &sim::Faults) -> anyhow::Result<()> {
    for line in io::stdin().lines() {
        let line = line?;
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["foreign", bytes] => faults.set_foreign_bytes(bytes.parse()?),
            ["process", pid, bytes] => faults.set_process_bytes(pid.parse()?, bytes.parse()?),
            _ => bail!("write `foreign BYTES` or `process PID BYTES`, not {line:?}"),
        }
    }
    Ok(())
}
