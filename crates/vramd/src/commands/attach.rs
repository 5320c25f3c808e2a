//! `vramd attach`.

use std::path::PathBuf;

use tokio::net::UnixStream;
use vramd_api::Bytes;
use vramd_api::attach::{Attach, Attached, Tensor};
use vramd_api::client::{self, Attachment};

use super::interrupts;
use crate::arguments::AttachArguments;
use crate::error::CommandError;
use crate::output::{Output, table, word};

pub async fn attach(server: &str, arguments: AttachArguments, output: Output) -> Result<(), CommandError> {
    let request = Attach {
        model: Some(arguments.target.model),
        component: arguments.target.component,
        device_id: arguments.device,
        ..Attach::default()
    };
    let socket: PathBuf =
        arguments.socket.or_else(|| client::unix_path(server)).unwrap_or_else(client::default_socket);
    let Attachment { attached, tensors, descriptors, stream } = client::attach(&socket, &request)?;
    output.say(&format!(
        "{} in {} tensors on {}, lease {}",
        Bytes::show(attached.block.bytes),
        tensors.len(),
        attached.device_id,
        attached.lease_id
    ));
    output.data(&attached, |_: &Attached| tensor_table(&tensors))?;
    if arguments.hold {
        stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(stream)?;
        let mut interrupts = interrupts()?;
        output.say("held; Ctrl-C lets go");
        tokio::select! {
            _ = interrupts.recv() => {}
            // The daemon says nothing more, so that this is the end of the connection.
            _ = stream.readable() => {
                return Err(CommandError::Fault("the daemon ended the lease".to_owned()));
            }
        }
    }
    drop(descriptors);
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
