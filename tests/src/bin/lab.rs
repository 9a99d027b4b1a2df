//! A lab to try things in by hand: it stands until its standard input ends.

use std::io::Read;

use anyhow::Result;
use clap::Parser;
use pclive_tests::Programs;
use pclive_tests::lab::{BitRate, Host, Lab, Payload};

/// Makes two hosts and a client, starts redis-server in a container at the source, and tells how to use them
#[derive(Parser)]
struct Arguments {
    /// Rate of the hosts' links in Mbit/s, 0 for as fast as the machine can
    #[arg(long, default_value_t = 1000)]
    rate: u64,
}

fn main() -> Result<()> {
    let rate = Arguments::parse().rate;
    let rate = (rate > 0).then_some(BitRate(rate * 1_000_000));
    let mut lab = Lab::with_programs(Programs::beside_own()?, rate)?;
    let redis = lab.add_container("redis", &Payload::redis())?;
    lab.source().start(&redis.name)?;
    println!("lab          {}", lab.dir().display());
    println!("redis        {}", redis.address);
    println!("client       nsenter --net={}", lab.client().path().display());
    [lab.source(), lab.destination()].into_iter().for_each(describe);
    println!("end the input (ctrl-d) to remove it all");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn describe(host: &Host) {
    let (role, address) = (host.role(), host.address());
    println!("{role:<12} nsenter --net={}  # {address}", host.netns().path().display());
    println!("{:12} --root {} --bundles {}", "", host.runtime_root().display(), host.bundles().display());
}
