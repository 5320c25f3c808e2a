//! `vramd config show`, and how every command that needs the daemon's settings gets them.

use serde_json::{Value, json};

use crate::arguments::ServeArguments;
use crate::error::CommandError;
use crate::output::{Output, table};
use crate::settings::{self, SETTINGS, Settings, SettingsError};

pub fn resolved(mut arguments: ServeArguments) -> Result<Settings, SettingsError> {
    let config = arguments.config.take();
    settings::resolve(arguments.layer(), config.as_deref(), &settings::environment())
}

pub fn show(arguments: ServeArguments, output: Output) -> Result<(), CommandError> {
    print(&resolved(arguments)?, output)
}

pub fn print(settings: &Settings, output: Output) -> Result<(), CommandError> {
    let rows = settings
        .rows()
        .map(|(key, value, origin)| json!({ "key": key, "value": value, "origin": origin.to_string() }));
    output.data(&json!({ "settings": rows }), |_| {
        let rows = settings.rows().into_iter().zip(SETTINGS).map(|((key, value, origin), setting)| {
            [key.to_owned(), shown(&value, setting.default), origin.to_string()]
        });
        table(["KEY", "VALUE", "FROM"], rows)
    })
}

/// A value for people; where the daemon decides, the words of the documentation.
fn shown(value: &Value, default: &str) -> String {
    match value {
        Value::Null => default.to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => default.to_owned(),
        Value::Array(values) => {
            values.iter().map(|value| shown(value, default)).collect::<Vec<_>>().join(":")
        }
        other => other.to_string(),
    }
}
