//! The programs that tests move: see [`pclive_tests::workloads`].

use clap::Parser;
use pclive_tests::workloads::control::{Answer, Client};
use pclive_tests::workloads::tree::children::Descriptors;
use pclive_tests::workloads::tree::roles;
use pclive_tests::workloads::{memory, processes, tree};
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Programs that know after a move whether everything is as it was")]
enum Command {
    /// Threads that change their memory at random and know every byte of it
    Memory(memory::Options),
    /// A process tree with one of every kind of kernel object
    Tree(tree::Options),
    /// The process of the tree that is blocked in a pipe read
    #[command(hide = true)]
    TreeReader { commands: RawFd, replies: RawFd },
    /// The process of the tree that sleeps
    #[command(hide = true)]
    TreeSleeper { replies: RawFd },
    /// The process of the tree that answers questions
    #[command(hide = true)]
    TreeMain {
        #[command(flatten)]
        descriptors: Descriptors,
        #[command(flatten)]
        options: tree::Options,
    },
    /// Processes that come and go without pause
    Processes(processes::Options),
    /// The one of them that executes one program after the other
    #[command(hide = true)]
    ProcessesPhoenix { generation: u64 },
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
        Command::Tree(options) => tree::run(&options).map(|()| ExitCode::FAILURE),
        Command::TreeReader { commands, replies } => {
            roles::reader(commands, replies).map(|()| ExitCode::SUCCESS)
        }
        Command::TreeSleeper { replies } => roles::sleeper(replies).map(|()| ExitCode::SUCCESS),
        Command::TreeMain { descriptors, options } => {
            tree::main(descriptors, options).map(|()| ExitCode::SUCCESS)
        }
        Command::Processes(options) => processes::run(&options).map(|()| ExitCode::FAILURE),
        Command::ProcessesPhoenix { generation } => {
            processes::phoenix(generation).map(|()| ExitCode::FAILURE)
        }
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
