//! One function for each command.

mod allocations;
mod attach;
mod config;
mod doctor;
mod events;
mod generate;
mod limits;
mod memory;
mod models;
mod movement;
mod operations;
mod plan;
mod pressure;
mod record;
mod replay;
mod reservations;
mod serve;
mod simulate;
mod usage;
mod workers;

use std::future::Future;
use std::process::ExitCode;

use vramd_api::RenewRequest;
use vramd_api::client::Client;

use crate::arguments::{Arguments, Command, ConfigCommand, Question};
use crate::error::CommandError;
use crate::output::Output;

pub fn run(arguments: Arguments, output: Output) -> Result<ExitCode, CommandError> {
    let server = arguments.global.server;
    match arguments.command {
        Command::Serve(arguments) => serve::serve(arguments, output)?,
        Command::Doctor(arguments) => return block_on(doctor::doctor(&server, arguments, output)),
        Command::Config { command: ConfigCommand::Show(arguments) } => config::show(arguments, output)?,
        Command::Replay(arguments) => replay::replay(&arguments, output)?,
        Command::Simulate(arguments) => simulate::simulate(&arguments, output)?,
        Command::Completions { shell } => generate::completions(shell)?,
        Command::Generate { page } => generate::page(page)?,
        #[cfg(unix)]
        Command::Loader { library, card } => serve::load(&library, &card, output)?,
        Command::Ask(question) => return block_on(ask(&Client::new(&server)?, question, output)),
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(client: &Client, question: Question, output: Output) -> Result<ExitCode, CommandError> {
    match question {
        Question::Status { device } => memory::status(client, device, output).await?,
        Question::Usage { device, window, step } => {
            usage::usage(client, device, window.as_deref(), step.as_deref(), output).await?;
        }
        Question::Devices => memory::devices(client, output).await?,
        Question::Limits(arguments) => limits::limits(client, arguments, output).await?,
        Question::Alloc(arguments) => allocations::alloc(client, arguments, output).await?,
        Question::Free { ids, peak } => return allocations::free(client, &ids, peak, output).await,
        Question::Reserve(arguments) => reservations::reserve(client, arguments, output).await?,
        Question::Footprints { model, forget } => {
            reservations::footprints(client, model, forget, output).await?;
        }
        Question::Renew { id, lease_seconds, used } => {
            let request = RenewRequest { lease_seconds, used_bytes: used };
            allocations::renew(client, id, &request, output).await?;
        }
        Question::Allocations(arguments) => allocations::list(client, arguments, output).await?,
        Question::Ps { device } => allocations::holders(client, device, output).await?,
        Question::Models { device, command } => {
            models::models(client, device.as_deref(), command, output).await?;
        }
        Question::Pressure { device } => pressure::pressure(client, device.as_deref(), output).await?,
        Question::Optimize(arguments) => return pressure::optimize(client, arguments, output).await,
        Question::Workers { command } => workers::workers(client, command, output).await?,
        Question::Plan { models, device } => return plan::plan(client, models, device, output).await,
        Question::Pin { model } => models::pin(client, &model, output).await?,
        Question::Unpin { model } => models::unpin(client, &model, output).await?,
        Question::Touch { model, keep_alive } => models::touch(client, &model, keep_alive, output).await?,
        Question::Load(arguments) => operations::load(client, arguments, output).await?,
        Question::Prefetch { model, device } => {
            operations::prefetch(client, &model, device, output).await?;
        }
        Question::Unload { model, device } => operations::unload(client, &model, device, output).await?,
        Question::Operations { id, state } => operations::operations(client, id, state, output).await?,
        Question::Transfer(arguments) => movement::transfer(client, arguments, output).await?,
        Question::Copy(arguments) => movement::copy(client, arguments, output).await?,
        Question::Defrag(arguments) => movement::defrag(client, arguments, output).await?,
        Question::Clear(arguments) => movement::clear(client, arguments, output).await?,
        Question::Pause { id } => operations::pause(client, id, output).await?,
        Question::Resume { id } => operations::resume(client, id, output).await?,
        Question::Cancel { id } => operations::cancel(client, id, output).await?,
        Question::Attach(arguments) => attach::attach(client.server(), arguments, output).await?,
        Question::Events { since, count } => events::events(client, since, count, output).await?,
        Question::Record(arguments) => record::record(client, arguments, output).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A client needs no threads beside its own.
fn block_on<T>(future: impl Future<Output = Result<T, CommandError>>) -> Result<T, CommandError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}
