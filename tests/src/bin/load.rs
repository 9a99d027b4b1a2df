//! A client for Redis and memcached that checks every answer: see `pclive_tests::load`.

use anyhow::Result;
use pclive_tests::load;

fn main() -> Result<()> {
    println!("{}", serde_json::to_string(&load::serve_commands()?)?);
    Ok(())
}
