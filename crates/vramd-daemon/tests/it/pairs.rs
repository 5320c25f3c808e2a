//! Bytes on their way between every two kinds of devices that open here.

use std::io::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};
use vramd_api::attach::Handle;
use vramd_daemon::Devices;
#[cfg(unix)]
use vramd_device::cuda;
#[cfg(windows)]
use vramd_device::d3d12;
use vramd_device::{Device, cpu, sim, vulkan};
#[cfg(unix)]
use vramd_fake_cuda::{Installed, loader_arguments};

use crate::meetings::allocated_on;
use crate::moves::{contents, fill};
use crate::support::{Daemon, Home, MIB, payload, wait_for, write_model};

/// This process, as a CUDA device started it.
#[cfg(unix)]
#[test]
fn as_a_loader() {
    let Some((library, card)) = loader_arguments() else { return };
    let control = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).expect("a descriptor");
    let _ = cuda::serve(&library, &card, &control);
}

/// Cards of the fake driver, which lies in the home of the test.
#[cfg(unix)]
fn fake_cards(home: &Home, count: usize) -> (Vec<cuda::Device>, Installed) {
    let directory = home.path("driver");
    std::fs::create_dir(&directory).expect("a directory");
    let uuids = (0..count).map(|_| format!("GPU-{}", uuid::Uuid::now_v7())).collect();
    let driver = Installed::new(&directory, uuids, 4 << 30).expect("a driver");
    let libraries = cuda::Libraries { cuda: driver.cuda(), nvml: driver.nvml() };
    let arguments = ["--exact", "pairs::as_a_loader", "--nocapture"].map(Into::into).to_vec();
    let loader = cuda::LoaderCommand { program: std::env::current_exe().expect("this program"), arguments };
    let options = cuda::Options { limit_bytes: Some(64 * MIB), ..cuda::Options::new(loader) };
    let cards = cuda::discover(&libraries).expect("a driver").into_iter();
    (cards.map(|card| cuda::Device::open(card, options.clone()).expect("it opens")).collect(), driver)
}

/// The first card that Direct3D 12 has.
#[cfg(windows)]
fn direct3d() -> Option<d3d12::Device> {
    match d3d12::discover().map(|adapters| adapters.into_iter().next()) {
        Ok(Some(adapter)) => {
            let options = d3d12::Options { ordinal: 0, limit_bytes: Some(64 * MIB) };
            Some(d3d12::Device::open(adapter, options).expect("it opens"))
        }
        other => {
            assert!(std::env::var_os("VRAMD_TEST_D3D12").is_none(), "{other:?}");
            skipped("Direct3D 12", &format!("{other:?}"));
            None
        }
    }
}

fn skipped(what: &str, reason: &str) {
    let text = format!("SKIPPED: pairs with {what}: {reason}\n");
    std::io::stderr().write_all(text.as_bytes()).expect("written");
}

/// Host memory, a simulated device, two cards of the fake CUDA driver or one of Direct3D 12, and each Vulkan driver of the
/// machine.
fn start(#[allow(unused, reason = "what is faked lies there")] home: &Home) -> (Daemon, Vec<String>) {
    let mut open: Vec<Arc<dyn Device>> = vec![
        Arc::new(cpu::Device::open(cpu::Options::default()).expect("host memory")),
        Arc::new(sim::Device::open(sim::Spec::new(0, 64 * MIB)).expect("a device")),
    ];
    #[cfg(unix)]
    open.extend(fake_cards(home, 2).0.into_iter().map(|card| -> Arc<dyn Device> { Arc::new(card) }));
    #[cfg(windows)]
    open.extend(direct3d().map(|device| -> Arc<dyn Device> { Arc::new(device) }));
    let others = open.len();
    match vulkan::discover() {
        Ok(adapters) => {
            for (ordinal, adapter) in (0..).zip(adapters) {
                let options = vulkan::Options { ordinal, limit_bytes: Some(64 * MIB) };
                open.push(Arc::new(vulkan::Device::open(adapter, options).expect("it opens")));
            }
        }
        Err(error) => skipped("Vulkan", &error.to_string()),
    }
    let names = names(&open);
    let needed = std::env::var_os("VRAMD_TEST_VULKAN").is_some();
    assert!(!needed || open.len() >= others + 2, "two Vulkan drivers are needed: {names:?}");
    let mut devices = Devices::default();
    for device in open {
        devices.add(device, 64 * MIB);
    }
    (home.start_on(devices, Vec::new()), names)
}

fn names(devices: &[Arc<dyn Device>]) -> Vec<String> {
    devices.iter().map(|device| device.facts().device.to_string()).collect()
}

fn transfer(daemon: &Daemon, item: &Value, to: &str) -> Value {
    let body = json!({"items": [item], "targetDeviceId": to, "checksum": true});
    let ended = daemon.post("/api/memory/transfer?wait=30", &body).data(200);
    assert_eq!(ended["state"], "Completed", "to {to}: {ended:#}");
    ended["result"]["items"][0].clone()
}

/// Waits until only the lease by time is left.
fn wait_until_detached(daemon: &Daemon, id: &str) {
    wait_for("the reader to be gone", || {
        let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
        (shown["leases"].as_array()?.len() == 1).then_some(())
    });
}

#[test]
fn every_byte_arrives_over_every_pair() {
    let home = Home::new();
    let (daemon, names) = start(&home);
    // More than one piece, and no multiple of anything.
    let bytes = 5_000_003;
    let written = payload(bytes, 3);
    let id = allocated_on(&daemon, "cpu:0", &json!({"sizeBytes": bytes, "leaseSeconds": 600}));
    fill(&daemon, &id, &written);
    let item = json!({"allocationId": id});
    let mut checksums = std::collections::BTreeSet::new();
    for from in &names {
        for to in names.iter().filter(|to| *to != from) {
            let on = |device: &str| {
                daemon.get(&format!("/api/memory/allocation/{id}")).data(200)["deviceId"] == device
            };
            if !on(from) {
                transfer(&daemon, &item, from);
            }
            let moved = transfer(&daemon, &item, to);
            checksums.insert(moved["checksum"]["value"].to_string());
            if to != "cpu:0" {
                transfer(&daemon, &item, "cpu:0");
            }
            let reader = daemon.attach(&json!({"allocationId": id})).expect("attached");
            let block = &reader.attached.block;
            assert!(
                contents(&reader.descriptors[0], block.offset, bytes as u64) == written,
                "{from} to {to}"
            );
            drop(reader);
            wait_until_detached(&daemon, &id);
        }
    }
    assert_eq!(checksums.len(), 1);
    daemon.release(&id).data(200);
    for name in names.iter().filter(|name| *name != "cpu:0") {
        daemon.all_is_back(name);
    }
}

#[test]
fn a_model_is_loaded_onto_every_device_and_copied_to_host_memory() {
    let home = Home::new();
    let (daemon, names) = start(&home);
    let written = write_model(&home.path("models/tiny.safetensors"), "w", 5_000_000);
    daemon.register("tiny", "tiny.safetensors");
    for name in &names {
        daemon.loaded("tiny", name);
        if name != "cpu:0" {
            transfer(&daemon, &json!({"model": "tiny"}), "cpu:0");
        }
        let reader = daemon.attach(&json!({"model": "tiny"})).expect("attached");
        let block = &reader.attached.block;
        assert!(
            contents(&reader.descriptors[0], block.offset, written.len() as u64) == written,
            "by way of {name}"
        );
        drop(reader);
        wait_for("the reader to be gone", || {
            (daemon.residency("tiny")[0]["attachedCount"] == 0).then_some(())
        });
        daemon.unloaded("tiny");
    }
    for name in names.iter().filter(|name| *name != "cpu:0") {
        daemon.all_is_back(name);
    }
}

#[test]
fn memory_of_a_card_is_attached_by_clients_that_can_import_it() {
    let home = Home::new();
    let (daemon, names) = start(&home);
    let cards = names.iter().filter(|name| !name.starts_with("cpu") && !name.starts_with("sim"));
    for name in cards {
        if daemon.get(&format!("/api/devices/{name}")).data(200)["capabilities"]["handle"].is_null() {
            skipped("clients that import", &format!("{name} cannot hand out memory"));
            continue;
        }
        // Large enough for a segment of its own.
        let body = json!({"sizeBytes": 8 * MIB});
        let id = allocated_on(&daemon, name, &body);
        match daemon.attach(&json!({"allocationId": id})) {
            Err(vramd_attach::AttachError::Api(refused)) => {
                assert_eq!(refused.code, vramd_api::ErrorCode::Conflict);
                assert!(refused.details["handle"].is_string(), "{refused:?}");
                assert!(refused.hint.is_some_and(|hint| hint.contains("cpu:0")));
            }
            other => panic!("it was granted: {other:?}"),
        }
        let request = json!({"allocationId": id, "handles": ["memfd", "vulkanOpaqueFd", "cudaPosixFd"]});
        let reader = daemon.attach(&request).expect("attached");
        let device = daemon.get(&format!("/api/devices/{name}")).data(200);
        assert_eq!(device["capabilities"]["readOnlyExport"], false);
        let segment = &reader.attached.segments[0];
        match &segment.handle {
            Handle::VulkanOpaqueFd { device_uuid, allocation_bytes, .. } => {
                assert_eq!(device_uuid.to_string(), device["uuid"]);
                assert!(*allocation_bytes >= segment.bytes);
            }
            Handle::CudaPosixFd { device_uuid } => assert_eq!(*device_uuid, device["uuid"]),
            Handle::Memfd => panic!("it is no memfd"),
            other => unreachable!("not of this system: {other:?}"),
        }
        drop(reader);
        wait_until_detached(&daemon, &id);
        let released = daemon.release(&id).data(200);
        // The driver does not tell whether this process has let go of it.
        assert_eq!(
            (&released["verified"], &released["heldBy"][0]["pid"]),
            (&json!(false), &json!(std::process::id()))
        );
        daemon.all_is_back(name);
    }
}

#[cfg(unix)]
#[test]
fn a_fault_that_the_driver_reports_is_an_event_and_a_fatal_one_loses_the_card() {
    let home = Home::new();
    let (mut cards, driver) = fake_cards(&home, 1);
    let mut devices = Devices::default();
    devices.add(Arc::new(cards.remove(0)), 64 * MIB);
    let daemon = home.start_on(devices, Vec::new());
    let id = daemon.allocated(&json!({"sizeBytes": 4096}));
    let mut events = daemon.events(None);
    driver.report_xid(0, 31).expect("reported");
    let fault = events.until("device.fault");
    assert_eq!(
        (&fault["deviceId"], &fault["kind"], &fault["code"]),
        (&json!("cuda:0"), &json!("Xid"), &json!(31))
    );
    assert_eq!(daemon.get("/api/devices/cuda:0").data(200)["health"], "Healthy");
    driver.report_xid(0, 79).expect("reported");
    assert_eq!(events.until("device.fault")["code"], 79);
    assert!(events.until("device.lost")["reason"].as_str().is_some_and(|reason| reason.contains("Xid 79")));
    daemon.release(&id).data(200);
    events.until("device.returned");
    daemon.all_is_back("cuda:0");
}

#[cfg(unix)]
#[test]
fn bytes_go_straight_from_card_to_card_or_by_way_of_host_memory() {
    let home = Home::new();
    let (cards, driver) = fake_cards(&home, 2);
    let mut devices = Devices::default();
    for card in cards {
        devices.add(Arc::new(card), 64 * MIB);
    }
    let daemon = home.start_on(devices, Vec::new());
    write_model(&home.path("models/tiny.safetensors"), "w", 5_000_000);
    daemon.register("tiny", "tiny.safetensors");
    daemon.loaded("tiny", "cuda:0");
    let transfer = |to: &str, mode: &str| {
        let body = json!({"items": [{"model": "tiny"}], "targetDeviceId": to, "mode": mode});
        let ended = daemon.post("/api/memory/transfer?wait=30", &body).data(200);
        assert_eq!(ended["state"], "Completed", "{ended:#}");
    };
    // There and back it is looked whether the bytes arrive; from then on none comes by way of host memory.
    transfer("cuda:1", "move");
    transfer("cuda:0", "move");
    driver.fail("cuMemcpyDtoHAsync_v2", 0, 999).expect("set");
    transfer("cuda:1", "move");
    // The way straight from card to card fails, and with it the loader that tried; the other way does not use that call.
    let loaders = driver.contexts().len();
    driver.fail("cuMemcpyDtoDAsync_v2", 0, 999).expect("set");
    transfer("cuda:0", "move");
    assert!(driver.contexts().len() > loaders);
    driver.mend().expect("mended");
    transfer("cuda:1", "move");
    // Nor does it where there is no memory to map what the other has.
    driver.fail("cuMemcpyDtoDAsync_v2", 0, 2).expect("set");
    transfer("cuda:0", "move");
    daemon.unloaded("tiny");
    daemon.all_is_back("cuda:0");
    daemon.all_is_back("cuda:1");
}
