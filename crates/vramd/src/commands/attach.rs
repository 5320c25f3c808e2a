//! `vramd attach`.

use std::path::PathBuf;

use vramd_api::Bytes;
use vramd_api::attach::{Attach, Attached, Tensor};
use vramd_api::client::local_path;
use vramd_attach::{AttachError, Attachment, Stopper, default_socket};

use crate::arguments::AttachArguments;
use crate::error::CommandError;
use crate::output::{Output, table, word};
use crate::system::interrupts;

pub async fn attach(server: &str, arguments: AttachArguments, output: Output) -> Result<(), CommandError> {
    let request = Attach {
        model: Some(arguments.target.model),
        component: arguments.target.component,
        device_id: arguments.device,
        moves: arguments.hold,
        ..Attach::default()
    };
    let socket: PathBuf = arguments.socket.or_else(|| local_path(server)).unwrap_or_else(default_socket);
    let attachment = vramd_attach::attach(&socket, &request)?;
    let attached = &attachment.attached;
    output.say(&format!(
        "{} in {} tensors on {}, lease {}",
        Bytes::show(attached.block.bytes),
        attachment.tensors.len(),
        attached.device_id,
        attached.lease_id
    ));
    output.data(attached, |_: &Attached| tensor_table(&attachment.tensors))?;
    if !arguments.hold {
        return Ok(());
    }
    let stopper = Stopper::of(&attachment.stream)?;
    let held = tokio::task::spawn_blocking(|| hold(attachment));
    let mut interrupts = interrupts()?;
    output.say("held; Ctrl-C lets go");
    tokio::select! {
        _ = interrupts.recv() => {
            // Ends the thread's wait, which the process would otherwise wait for.
            stopper.stop();
            Ok(())
        }
        ended = held => {
            ended.map_err(std::io::Error::other)??;
            Err(CommandError::Fault("the daemon ended the lease".to_owned()))
        }
    }
}

/// Holds the lease until the connection ends. Nothing is mapped here, so that every move can be accepted at once.
fn hold(mut attachment: Attachment) -> Result<(), AttachError> {
    while let Some(place) = attachment.next_move()? {
        attachment.accept(place)?;
    }
    Ok(())
}

fn tensor_table(tensors: &[Tensor]) -> String {
    table(
        ["TENSOR", "TYPE", "SHAPE", ">OFFSET", ">BYTES"],
        tensors.iter().map(|tensor| {
            let shape: Vec<_> = tensor.shape.iter().map(u64::to_string).collect();
            [
                tensor.name.clone(),
                word(tensor.dtype),
                format!("[{}]", shape.join(", ")),
                tensor.offset.to_string(),
                tensor.bytes.to_string(),
            ]
        }),
    )
}
