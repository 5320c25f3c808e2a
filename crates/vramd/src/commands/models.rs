//! `vramd models`, `pin`, `unpin`, `touch`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use vramd_api::client::Client;
use vramd_api::{
    Bytes, Component, ComponentName, ComponentSource, KeepAlive, Model, ModelName, RegisterModel, Residency,
    TouchRequest,
};

use super::pressure;
use crate::arguments::{AddModelArguments, ModelsCommand};
use crate::error::CommandError;
use crate::output::{Output, list, table, time_since, time_until, word};

pub async fn models(
    client: &Client,
    device: Option<&str>,
    command: Option<ModelsCommand>,
    output: Output,
) -> Result<(), CommandError> {
    match command {
        None => match device {
            Some(device) => output.data(&client.model_status(device).await?, pressure::models),
            None => output.data(&client.models().await?, |page| summary(&page.models)),
        },
        Some(ModelsCommand::Add(arguments)) => add(client, arguments, output).await,
        Some(ModelsCommand::Rm { model }) => {
            output.data(&client.remove_model(&model).await?, |model| format!("{} is forgotten", model.name))
        }
        Some(ModelsCommand::Show { model }) => output.data(&client.model(&model).await?, details),
    }
}

async fn add(client: &Client, arguments: AddModelArguments, output: Output) -> Result<(), CommandError> {
    let whole = arguments.path.map(|path| {
        let name: ComponentName = "weights".parse().expect("it is a valid name");
        (name, path)
    });
    let mut components = BTreeMap::new();
    for (name, path) in whole.into_iter().chain(arguments.component) {
        if components.insert(name.clone(), source(path)?).is_some() {
            return Err(CommandError::Usage {
                message: format!("the component {name} is given twice"),
                hint: "give each component one path; shards belong in one index file".to_owned(),
            });
        }
    }
    let request = RegisterModel {
        name: arguments.model,
        components,
        keep_alive: arguments.keep_alive,
        pinned: arguments.pin,
        priority: arguments.priority,
    };
    let model = client.register_model(&request).await?;
    output.data(&model, |model| summary(std::slice::from_ref(model)))
}

/// The daemon takes absolute paths only: it has another working directory.
fn source(path: PathBuf) -> Result<ComponentSource, CommandError> {
    let path = std::path::absolute(path)?;
    match path.into_os_string().into_string() {
        Ok(path) => Ok(ComponentSource { path }),
        Err(path) => Err(CommandError::Usage {
            message: format!("the path {} is not UTF-8", path.display()),
            hint: "JSON cannot carry it: rename the file".to_owned(),
        }),
    }
}

pub async fn pin(client: &Client, model: &ModelName, output: Output) -> Result<(), CommandError> {
    output.data(&client.pin(model).await?, |model| summary(std::slice::from_ref(model)))
}

pub async fn unpin(client: &Client, model: &ModelName, output: Output) -> Result<(), CommandError> {
    output.data(&client.unpin(model).await?, |model| summary(std::slice::from_ref(model)))
}

pub async fn touch(
    client: &Client,
    model: &ModelName,
    keep_alive: Option<KeepAlive>,
    output: Output,
) -> Result<(), CommandError> {
    let model = client.touch(model, &TouchRequest { keep_alive }).await?;
    output.data(&model, |model| summary(std::slice::from_ref(model)))
}

fn summary(models: &[Model]) -> String {
    table(
        ["MODEL", ">SIZE", "COMPONENTS", "RESIDENT", ">ATTACHED", "KEPT", "USED"],
        models.iter().map(|model| {
            let names: Vec<_> = model.components.iter().map(|it| it.name.as_str()).collect();
            let attached: u64 =
                model.components.iter().flat_map(|it| &it.residency).map(|it| it.attached_count).sum();
            [
                model.name.to_string(),
                Bytes::show(model.size_bytes),
                names.join(","),
                residency(model),
                attached.to_string(),
                kept(model),
                model.last_used_at.map_or_else(|| "-".to_owned(), time_since),
            ]
        }),
    )
}

/// Each device on which something of the model is, with its state there.
fn residency(model: &Model) -> String {
    let mut states: Vec<_> = model
        .components
        .iter()
        .flat_map(|component| &component.residency)
        .map(|residency| format!("{} {}", residency.device_id, state(residency)))
        .collect();
    states.sort();
    states.dedup();
    if states.is_empty() { "OnDisk".to_owned() } else { states.join(", ") }
}

fn state(residency: &Residency) -> String {
    match &residency.cached_from {
        Some(device) => format!("cached from {device}"),
        None => word(residency.state),
    }
}

fn kept(model: &Model) -> String {
    match (model.pinned, model.expires_at) {
        (true, _) => "pinned".to_owned(),
        (false, Some(end)) => format!("expires {}", time_until(end)),
        (false, None) if model.keep_alive == KeepAlive::Forever => "for ever".to_owned(),
        (false, None) => format!("{} idle", model.keep_alive),
    }
}

fn details(model: &Model) -> String {
    let head = list(&[
        ("model", model.name.to_string()),
        ("size", Bytes::show(model.size_bytes)),
        ("kept", kept(model)),
        ("priority", model.priority.to_string()),
        ("used", model.last_used_at.map_or_else(|| "never".to_owned(), time_since)),
        ("registered", time_since(model.registered_at)),
    ]);
    let components = table(
        ["COMPONENT", ">SIZE", ">TENSORS", ">SHARDS", "RESIDENT", "PATH"],
        model.components.iter().map(|component| {
            [
                component.name.to_string(),
                Bytes::show(component.size_bytes),
                component.tensor_count.to_string(),
                component.shard_count.to_string(),
                places(component),
                component.path.clone(),
            ]
        }),
    );
    let faults = model.components.iter().filter_map(|component| {
        component.error.as_ref().map(|error| format!("\n{}: {error}", component.name))
    });
    faults.fold(format!("{head}\n{components}"), |text, fault| text + &fault)
}

fn places(component: &Component) -> String {
    let places: Vec<_> = component
        .residency
        .iter()
        .map(|it| {
            let shared = if it.shared { ", shared" } else { "" };
            format!("{} {} ({} attached{shared})", it.device_id, state(it), it.attached_count)
        })
        .collect();
    if places.is_empty() { "OnDisk".to_owned() } else { places.join(", ") }
}
