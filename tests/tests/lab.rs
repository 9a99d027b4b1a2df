//! The lab itself: containers serve clients in it, it can shape and cut its links, and nothing of it stays behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use pclive_tests::Programs;
use pclive_tests::lab::{self, BitRate, Lab, Payload};
use pclive_tests::load::{LoadProcess, LoadSpec, Pace, Service};

const MIB: u64 = 1 << 20;

#[test]
fn redis_answers_right_in_a_shaped_lab() -> Result<()> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let redis = lab.add_container("redis", &Payload::redis())?;
    lab.source().start(&redis.name)?;
    let server = SocketAddr::from((redis.address, 6379));
    let spec = LoadSpec::new(Service::Redis, 32 * MIB);
    let mut load = LoadProcess::fill(&lab, server, &spec)?;
    load.start()?;
    sleep(Duration::from_secs(1));
    load.mark("half")?;
    sleep(Duration::from_secs(1));
    let report = load.stop()?;
    assert_eq!(report.complaint(), None);
    assert!(report.reads > 5 * report.writes && report.writes > 100, "{report:?}");
    assert!(report.verified_keys > 10_000, "{report:?}");
    let half_us = report.mark_us("half").expect("marked above");
    assert!((900_000..1_500_000).contains(&half_us), "{half_us}");
    println!("{:?} {:?} {:.0}/s", report.longest_gap(), report.latency, report.rate_between(0, half_us));
    Ok(())
}

#[test]
fn memcached_answers_right_in_an_open_loop() -> Result<()> {
    let mut lab = Lab::new(None)?;
    let memcached = lab.add_container("memcached", &Payload::memcached(64))?;
    lab.source().start(&memcached.name)?;
    let server = SocketAddr::from((memcached.address, 11211));
    let spec = LoadSpec {
        pace: Pace::PerSecond(5_000.0),
        read_percent: 50,
        value_bytes: 100..=1000,
        ..LoadSpec::new(Service::Memcached, 16 * MIB)
    };
    let mut load = LoadProcess::fill(&lab, server, &spec)?;
    load.start()?;
    sleep(Duration::from_secs(2));
    let report = load.stop()?;
    assert_eq!(report.complaint(), None);
    let rate = (report.reads + report.writes) as f64 * 1e6 / report.duration_us as f64;
    assert!((4_500.0..5_500.0).contains(&rate), "{rate} requests per second");
    println!("{:?} {:?}", report.longest_gap(), report.latency);
    Ok(())
}

/// A server that loses an acknowledged write is noticed: here somebody else overwrites the keys.
#[test]
fn a_lost_write_is_a_wrong_answer() -> Result<()> {
    let mut lab = Lab::new(None)?;
    let redis = lab.add_container("redis", &Payload::redis())?;
    lab.source().start(&redis.name)?;
    let server = SocketAddr::from((redis.address, 6379));
    let mut load = LoadProcess::fill(&lab, server, &LoadSpec::new(Service::Redis, MIB))?;
    let port = server.port().to_string();
    let mut delete = lab.client().command("redis-cli");
    lab::run(delete.args(["-h", &server.ip().to_string(), "-p", &port, "DEL", "k0000000007"]))?;
    load.start()?;
    let report = load.stop()?;
    assert!(report.wrong_answers > 0, "{report:?}");
    assert!(report.first_wrong_answers[0].contains("key 7: missing"), "{report:?}");
    Ok(())
}

/// The same address answers from the other host as soon as its link is up there: the lab's own part of a blackout.
#[test]
fn a_container_address_moves_in_milliseconds() -> Result<()> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let redis = lab.add_container("redis", &Payload::redis())?;
    let (source, destination) = (lab.source(), lab.destination());
    source.start(&redis.name)?;
    destination.start(&redis.name)?;
    destination.container_netns(&redis.name).ip("link set eth0 down")?;
    let ping = || {
        let mut ping = lab.client().command("redis-cli");
        lab::run(ping.args(["-h", &redis.address.to_string(), "PING"]))
    };
    let begin = Instant::now();
    while ping().is_err() && begin.elapsed() < Duration::from_secs(10) {} // until it listens
    assert_eq!(ping()?, "PONG\n");
    source.container_netns(&redis.name).ip("link set eth0 down")?;
    let start = Instant::now();
    let moved = destination.container_netns(&redis.name);
    moved.ip("link set eth0 up")?;
    // Whatever it sends moves its MAC; pclive sends a gratuitous ARP.
    let send = || UdpSocket::bind("0.0.0.0:0")?.send_to(b"here", (source.address(), 9));
    moved.enter(send)??;
    assert_eq!(ping()?, "PONG\n");
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_millis(500), "{elapsed:?}");
    println!("moved in {elapsed:?}");
    Ok(())
}

/// Two labs at a time do not meet, and a dropped one leaves nothing.
#[test]
fn labs_are_apart_and_leave_nothing() -> Result<()> {
    let traces = |dir: &Path| -> Result<String> {
        let id = dir.file_name().expect("a lab's directory has a name").to_string_lossy();
        let places = ["/run/netns", "/var/tmp/pclive-lab", "/sys/fs/cgroup"];
        let mut find = Command::new("find");
        find.args(places).args(["-ignore_readdir_race", "-maxdepth", "3", "-path", &format!("*{id}*")]);
        lab::run(&mut find)
    };
    let mut first = Lab::new(Some(BitRate::GIGABIT))?;
    let mut second = Lab::new(None)?;
    for lab in [&mut first, &mut second] {
        lab.add_container("sleeper", &Payload::program("/bin/sleep", &["1000"]))?;
        lab.source().start("sleeper")?;
        assert_eq!(lab.source().exec("sleeper", &["cat", "/proc/1/comm"])?, "sleep\n");
        assert!(lab.destination().list()?.is_empty());
        assert!(traces(lab.dir())?.lines().count() > 5);
    }
    let dir = first.dir().to_owned();
    let pid = first.source().container_pid("sleeper")?;
    drop(first);
    assert_eq!(traces(&dir)?, "");
    // Init may not have buried it yet, but it is dead: a zombie has no directory any more.
    assert!(fs::read_link(format!("/proc/{pid}/cwd")).is_err(), "the container's process is gone");
    assert_eq!(second.source().exec("sleeper", &["true"])?, "", "the other lab goes on");
    Ok(())
}

/// A lab whose owner was killed is taken down by the next one.
#[test]
fn leftovers_are_swept() -> Result<()> {
    let mut owner = Command::new(Programs::beside_own()?.path("lab")?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(owner.stdout.take().expect("piped above")).lines();
    let lab = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("lab ").map(str::to_owned));
    owner.kill()?;
    owner.wait()?;
    let lab = PathBuf::from(lab.expect("the owner names its lab").trim());
    assert!(lab.exists());
    drop(Lab::new(None)?);
    assert!(!lab.exists());
    Ok(())
}
