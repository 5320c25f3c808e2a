//! `vramd usage`.

use vramd_api::client::Client;
use vramd_api::{Bytes, DeviceUsage, UsageShare};

use crate::error::CommandError;
use crate::output::{Output, percent, span, table};

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

pub async fn usage(
    client: &Client,
    device: Option<String>,
    window: Option<&str>,
    step: Option<&str>,
    output: Output,
) -> Result<(), CommandError> {
    if let Some(device) = device {
        let usage = client.device_usage(&device, window, step).await?;
        return output.data(&usage, |usage| show(std::slice::from_ref(usage)));
    }
    output.data(&client.usage(window, step).await?, |page| show(&page.devices))
}

fn show(devices: &[DeviceUsage]) -> String {
    let rows = table(
        ["DEVICE", ">SAMPLED", ">PEAK", ">AVERAGE", ">USED", ">FRAGMENTED", ">ALLOCS/S", "USED OVER TIME"],
        devices.iter().map(|device| {
            let unknown = || "-".to_owned();
            [
                device.device_id.to_string(),
                span(device.sampled_seconds.cast_signed()),
                device.peak.map_or_else(unknown, |peak| Bytes::show(peak.used_bytes)),
                device.average.map_or_else(unknown, |average| Bytes::show(average.used_bytes)),
                device.average.map_or_else(unknown, |average| percent(average.utilization)),
                device.average.map_or_else(unknown, |average| percent(average.fragmentation)),
                device.rates.map_or_else(unknown, |rates| format!("{:.2}", rates.allocations_per_second)),
                bars(device),
            ]
        }),
    );
    devices.iter().fold(rows, |text, device| {
        text + &shares(device, "OWNER", &device.by_owner) + &shares(device, "PURPOSE", &device.by_purpose)
    })
}

/// One bar for each step, the highest peak in full.
fn bars(device: &DeviceUsage) -> String {
    let most = device.samples.iter().map(|sample| sample.peak_used_bytes).max().unwrap_or(0).max(1);
    let bar = |used: u64| BARS[(used as f64 / most as f64 * 7.0).round() as usize % BARS.len()];
    device.samples.iter().map(|sample| bar(sample.peak_used_bytes)).collect()
}

fn shares(device: &DeviceUsage, what: &str, shares: &[UsageShare]) -> String {
    if shares.is_empty() {
        return String::new();
    }
    let head = [format!("{what} on {}", device.device_id), ">NOW".into(), ">PEAK".into(), ">AVERAGE".into()];
    let rows = table(
        head.each_ref().map(String::as_str),
        shares.iter().map(|share| {
            let name = if share.name.is_empty() { "-".to_owned() } else { share.name.clone() };
            [name, Bytes::show(share.bytes), Bytes::show(share.peak_bytes), Bytes::show(share.average_bytes)]
        }),
    );
    format!("\n{rows}")
}
