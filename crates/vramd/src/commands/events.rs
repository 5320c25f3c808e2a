//! `vramd events`.

use std::pin::pin;

use futures_util::StreamExt;
use serde_json::Value;
use vramd_api::client::Client;
use vramd_api::{Event, EventKind};

use crate::error::CommandError;
use crate::output::Output;

pub async fn events(
    client: &Client,
    since: Option<String>,
    count: Option<u64>,
    output: Output,
) -> Result<(), CommandError> {
    let mut events = pin!(client.events(since.as_deref()).await?);
    let mut left = count.unwrap_or(u64::MAX);
    let mut last = since;
    while left > 0 {
        let event = match events.next().await {
            Some(event) => event?,
            None => return Err(ended(last.as_deref())),
        };
        output.line(&event, line)?;
        if event.event == EventKind::DaemonStopping {
            break;
        }
        last = Some(event.id);
        left -= 1;
    }
    Ok(())
}

fn ended(last: Option<&str>) -> CommandError {
    let hint = match last {
        Some(id) => format!("`vramd events --since {id}` goes on where this ended"),
        None => "`vramd doctor` says whether a daemon answers".to_owned(),
    };
    CommandError::Usage { message: "the daemon ended the stream".to_owned(), hint }
}

fn line(event: &Event) -> String {
    let data = match &event.data {
        Value::Object(fields) => fields.iter().map(pair).collect::<Vec<_>>().join(" "),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let kind = event.event.to_string();
    format!("{}  {:.3}  {kind:<20}  {data}", event.id, event.at).trim_end().to_owned()
}

fn pair((key, value): (&String, &Value)) -> String {
    match value {
        Value::String(value) => format!("{key}={value}"),
        other => format!("{key}={other}"),
    }
}
