//! The `pclive` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    pclive::cli::main()
}
