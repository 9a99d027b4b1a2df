//! The peer: CRIU moves the same container, driven by `runc checkpoint` and `runc restore`.
//!
//! It is given what it needs to do well: pages go through its page server straight into the destination's memory (the
//! images are in a tmpfs), the other images are copied over the same link, connections are kept, nftables blocks them
//! (iptables takes a process for each). Nothing of CRIU is in this project: the user says where it is.
//!
//! Memory is dumped once, while the container stands still. CRIU could copy most of it before (`pre-dump`), but only on
//! kernels with soft-dirty bits; that is not done here, and the mover's name says so.

mod images;
mod stats;

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use pclive_tests::lab::{Host, Netns, run};
use pclive_tests::scene::{MIGRATE, MIGRATED, Scene};

use super::movement::{Movement, Part};
pub use images::{Images, size};

/// Where the page server listens.
const PAGES_PORT: u16 = 7012;
/// Where the other images are taken.
const IMAGES_PORT: u16 = 7013;
const PAGE_BYTES: u64 = 4096;

/// A CRIU that can be run.
#[derive(Debug, Clone)]
pub struct Criu {
    program: PathBuf,
    version: String,
}

/// When what was done.
struct Times {
    begin: Instant,
    dumped: Instant,
    /// The same by the clock of files.
    dumped_at: SystemTime,
    copied: Instant,
    restored: Instant,
}

impl Times {
    /// How long the container had been frozen when dumping it was done. CRIU writes its statistics when it lets go of the
    /// processes; runc has to tidy up after that.
    fn since_freeze(&self, dump: stats::Dump, images: &Images) -> Result<Duration> {
        let written =
            fs::metadata(images.beside("stats-dump"))?.modified().context("when stats-dump was written")?;
        let after = self.dumped_at.duration_since(written).unwrap_or_default();
        Ok(after + Duration::from_micros(dump.freezing_us + dump.frozen_us))
    }
}

impl Criu {
    /// The one at that path.
    ///
    /// # Errors
    /// When it does not run.
    pub fn at(program: &Path) -> Result<Self> {
        let program = program.canonicalize().with_context(|| format!("find {}", program.display()))?;
        let said = run(Command::new(&program).arg("--version"))?;
        let version = said.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap_or("unknown");
        Ok(Self { program, version: version.trim().to_owned() })
    }

    /// Moves the scene's container; `shared` says whether pages take the link that clients use.
    ///
    /// # Errors
    /// When it did not move: the message has the end of CRIU's log.
    pub fn migrate(&self, scene: &mut Scene, images: &Images, shared: bool) -> Result<Movement> {
        scene.load().mark(MIGRATE)?;
        let begin = Instant::now();
        let name = scene.container().name.clone();
        let (source, destination) = (scene.lab().source(), scene.lab().destination());
        let address = if shared { destination.address() } else { destination.interlink_address() };
        let runc = Runc { criu: self, images, name: &name };
        let output = Output::of(source.container_pid(&name)?)?;
        runc.start_page_server(destination, address)?;
        runc.checkpoint(source, address, &output)?;
        let (dumped, dumped_at) = (Instant::now(), SystemTime::now());
        source.container_netns(&name).ip("link set eth0 down")?;
        // A file that CRIU finds open must be there as it was; this one is the container's output.
        fs::copy(source.logs().join(&name), destination.logs().join(&name))
            .context("copy the container's output")?;
        let from = (source.netns(), &*images.source());
        let to = (destination.netns(), &*images.destination());
        let image_bytes = images::copy(from, to, SocketAddr::from((address, IMAGES_PORT)))?;
        let copied = Instant::now();
        let silence = Silence::over(destination.container_netns(&name))?;
        runc.restore(destination, &output)?;
        silence.end()?;
        let times = Times { begin, dumped, dumped_at, copied, restored: Instant::now() };
        scene.load().mark(MIGRATED)?;
        self.movement(images, &times, image_bytes)
    }

    fn movement(&self, images: &Images, times: &Times, image_bytes: u64) -> Result<Movement> {
        let read = |name: &str| fs::read(images.beside(name)).with_context(|| format!("read {name}"));
        let dump = stats::parse_dump(&read("stats-dump")?).context("understand stats-dump")?;
        let restore = stats::parse_restore(&read("stats-restore")?).context("understand stats-restore")?;
        let us = |from: Instant, to: Instant| to.duration_since(from).as_micros() as u64;
        let frozen = times.dumped - times.since_freeze(dump, images)?.min(times.dumped - times.begin);
        let (blackout_us, restore_us) = (us(frozen, times.restored), us(times.copied, times.restored));
        let transfer_us = dump.memory_write_us + us(times.dumped, times.copied);
        let dump_us = blackout_us.saturating_sub(transfer_us + restore_us);
        let part = |name: &str, us| Part { name: name.into(), us };
        let pages_bytes = dump.pages_written * PAGE_BYTES;
        Ok(Movement {
            tracker: format!("none (CRIU {})", self.version),
            blackout_us,
            restore_us,
            total_us: us(times.begin, times.restored),
            rounds: 1,
            bytes_sent: pages_bytes + image_bytes,
            blackout: vec![part("dump", dump_us), part("transfer", transfer_us), part("restore", restore_us)],
            restore: vec![
                part("runc, set-up", restore_us.saturating_sub(restore.restore_us)),
                part("fork", restore.forking_us),
                part("restore memory and state", restore.restore_us.saturating_sub(restore.forking_us)),
            ],
            frozen_us: us(times.begin, frozen),
            report: serde_json::json!({ "criu": self.version, "dump": dump, "restore": restore }),
        })
    }
}

/// The container's standard output: a file of the host that CRIU cannot find in the container's root.
struct Output {
    /// How CRIU calls it.
    key: String,
}

impl Output {
    fn of(init: Pid) -> Result<Self> {
        let fd = format!("/proc/{init}/fd/1");
        let inode = fs::metadata(&fd).with_context(|| format!("stat {fd}"))?.ino();
        let fdinfo = fs::read_to_string(format!("/proc/{init}/fdinfo/1")).context("read fdinfo")?;
        let mount = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let mount: u64 = mount.context("fdinfo has no mnt_id")?.trim().parse().context("a mount's number")?;
        Ok(Self { key: format!("file[{mount:x}:{inode:x}]") })
    }
}

/// `runc` with a CRIU of the user's.
struct Runc<'a> {
    criu: &'a Criu,
    images: &'a Images,
    name: &'a str,
}

impl Runc<'_> {
    /// Starts to take pages. It ends by itself when it has them all.
    fn start_page_server(&self, host: &Host, address: Ipv4Addr) -> Result<()> {
        let mut command = host.command(&self.criu.program);
        command.args(["page-server", "--daemon", "--address", &address.to_string()]);
        command.args(["--port", &PAGES_PORT.to_string(), "--images-dir"]).arg(self.images.destination());
        // It would hold a pipe open for as long as it runs.
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let status = status.context("start criu page-server")?;
        ensure!(status.success(), "criu page-server: {status}");
        Ok(())
    }

    fn checkpoint(&self, host: &Host, address: Ipv4Addr, output: &Output) -> Result<()> {
        let mut command = self.runc(host, &format!("external {}", output.key))?;
        command.args([
            "checkpoint",
            "--tcp-established",
            "--page-server",
            &format!("{address}:{PAGES_PORT}"),
        ]);
        command.arg("--image-path").arg(self.images.source());
        self.run("runc checkpoint", command, Stdio::null(), "dump.log")
    }

    fn restore(&self, host: &Host, output: &Output) -> Result<()> {
        let mut command = self.runc(host, &format!("inherit-fd fd[1]:{}", output.key))?;
        command.args(["restore", "--detach", "--tcp-established"]);
        command.arg("--image-path").arg(self.images.destination());
        command.arg("--bundle").arg(host.bundles().join(self.name));
        let log = host.logs().join(self.name);
        let log =
            File::options().append(true).open(&log).with_context(|| format!("open {}", log.display()))?;
        self.run("runc restore", command, log.into(), "restore.log")
    }

    /// A runc that finds the user's CRIU first, with an option that runc itself does not have.
    fn runc(&self, host: &Host, option: &str) -> Result<Command> {
        let programs = self.images.beside("bin");
        if !programs.exists() {
            fs::create_dir(&programs).context("make a directory for a link to CRIU")?;
            symlink(&self.criu.program, programs.join("criu")).context("link CRIU")?;
        }
        let options = self.images.beside("criu.conf");
        fs::write(&options, format!("network-lock nftables\n{option}\n")).context("write CRIU's options")?;
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = host.command("runc");
        command.env("PATH", path).env("CRIU_CONFIG_FILE", options);
        command.arg("--root").arg(host.runtime_root());
        Ok(command)
    }

    fn run(&self, action: &str, mut command: Command, output: Stdio, log: &str) -> Result<()> {
        let work = self.images.beside("");
        command.arg("--work-path").arg(&work).arg(self.name);
        let errors = self.images.beside("runc.log");
        let file = File::create(&errors).context("make a log for runc")?;
        let status =
            command.stdin(Stdio::null()).stdout(output).stderr(file).status().context("start runc")?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(errors).unwrap_or_default();
        let log = fs::read_to_string(work.join(log)).unwrap_or_default();
        let log: Vec<_> = log.lines().filter(|line| line.contains("Error")).collect();
        bail!("{action}: {status}: {}\n{}", said.trim(), log.join("\n"))
    }
}

/// A network in which nothing arrives: a packet for a connection that is not there yet would be answered by a reset.
///
/// Routing does it: every kernel has that. What the container sends, such as the answers that it has ready, goes out.
struct Silence(Netns);

impl Silence {
    fn over(netns: Netns) -> Result<Self> {
        // The first rule finds local addresses; the blackhole has to come before it.
        netns.ip("rule add pref 2 lookup local\n\
             rule add pref 1 iif eth0 blackhole\n\
             rule del pref 0\n\
             link set eth0 up")?;
        Ok(Self(netns))
    }

    fn end(self) -> Result<()> {
        self.0.ip("rule del pref 1")
    }
}
