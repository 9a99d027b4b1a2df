//! The programs that tests move: see [`pclive_tests::workloads`].

use clap::Parser;
use pclive_tests::workloads::control::{Answer, Client};
use pclive_tests::workloads::memory;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Programs that know after a move whether everything is as it was")]
enum Command {
    /// Threads that change their memory at random and know every byte of it
    Memory(memory::Options),
    /// Ask a workload: exit 0 if the answer is ok, 1 if something differs
    Ask {
        /// HOST:PORT of the workload
        address: String,
        /// `check` or `instance`
        question: String,
        /// Seconds to wait for the answer
        #[arg(long, default_value_t = 60)]
        patience: u64,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Command::parse() {
        Command::Memory(options) => memory::run(options).map(|()| ExitCode::FAILURE),
        Command::Ask { address, question, patience } => ask(&address, &question, patience),
    }
}

fn ask(address: &str, question: &str, patience: u64) -> anyhow::Result<ExitCode> {
    match Client::connect(address)?.ask(question, Duration::from_secs(patience))? {
        Answer::Ok(counters) => {
            println!("ok {counters}");
            Ok(ExitCode::SUCCESS)
        }
        Answer::Differs(list) => {
            list.iter().for_each(|difference| println!("differs: {difference}"));
            Ok(ExitCode::FAILURE)
        }
    }
}
