//! `cargo xtask`: everything a developer of pclive does with one command.

mod bench;
mod build;
mod experiment;
mod interrupt;
mod run;
mod setup;
mod test;
mod vm;
mod warm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything a developer of pclive does with one command")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing for building and testing pclive (Debian, as root)
    Setup,
    /// Move a Redis container under full load between two lab hosts and show what its clients see
    Run(run::Options),
    /// Run all tests
    Test(test::Options),
    Bench(Box<bench::Options>),
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup => setup::setup(),
        Task::Run(options) => run::run(&options),
        Task::Test(options) => test::test(&options),
        Task::Bench(options) => bench::bench(&options),
        Task::Vm(options) => vm::vm(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
