//! A virtual machine that has this machine's files, read-only, and another kernel.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::kernel::Kernel;
use crate::build::write_program;

/// What [`INIT`] prints before it starts the commands, and before their exit status.
const BEGINS: &str = "pclive-vm: begins";
const STATUS: &str = "pclive-vm: status ";
const INIT: &str = include_str!("init.sh");
/// Where QEMU has it, and where newer Debians do.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];
/// QEMU 7.2 gets `cmpxchg16b` wrong where processors run at the same time, and five levels of page tables; the kernel does
/// without.
const CPU: &str = "max,la57=off,-cx16";
/// Emulated, one processor at a time: if they run at the same time, one may meet a breakpoint of the kernel's that
/// another has just removed. Hardware virtualisation is not used, because not each machine has it.
const ACCELERATOR: &str = "tcg,thread=single";

/// What a virtual machine is to be.
pub struct Machine<'a> {
    /// Its kernel.
    pub kernel: &'a Kernel,
    /// Where its kernel's modules are in `kernel`, and where it finds its commands.
    pub dir: &'a Path,
    /// Further parameters of its kernel.
    pub append: &'a str,
    /// Its memory.
    pub memory_mib: u64,
    /// How long it may run.
    pub patience: Duration,
}

impl Machine<'_> {
    /// Runs a shell script in it and shows what it prints; returns its exit status.
    ///
    /// # Errors
    /// When the machine does not come to the script's end.
    pub fn run(&self, commands: &str) -> Result<i32> {
        let init = self.dir.join("init");
        write_program(&init, INIT)?;
        fs::write(self.dir.join("commands"), commands).context("write the commands")?;
        let (dir, init) = (plain(self.dir)?, plain(&init)?);
        let room = tempfile::tempdir_in(self.dir).context("make a directory for a socket")?;
        let socket = room.path().join("files");
        let socket = plain(&socket)?;
        let _files = share_files(socket)?;
        let qemu = self.qemu(socket, &format!("init={init} -- {dir}")).spawn();
        let mut qemu = Stopped(qemu.context("start qemu-system-x86_64")?);
        let output = qemu.0.stdout.take().context("QEMU has an output")?;
        let (lines, console) = channel();
        std::thread::spawn(move || {
            // Until nobody listens any more.
            BufReader::new(output).split(b'\n').map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        follow(&console, Instant::now() + self.patience)
    }

    /// QEMU with the files that are served at `socket`, and parameters of the kernel that say what to start.
    fn qemu(&self, socket: &str, start: &str) -> Command {
        let memory = format!("{}M", self.memory_mib);
        let append = self.append;
        let mut qemu = bound_to_us("qemu-system-x86_64");
        qemu.args(["-accel", ACCELERATOR, "-cpu", CPU, "-smp", "2", "-m", &memory])
            .args(["-object", &format!("memory-backend-memfd,id=memory,size={memory},share=on")])
            .args(["-numa", "node,memdev=memory", "-nodefaults", "-nographic", "-no-reboot"])
            .args(["-chardev", &format!("socket,id=files,path={socket}")])
            .args(["-device", "vhost-user-fs-pci,chardev=files,tag=files", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 rootfstype=virtiofs root=files ro {append} {start}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        qemu
    }
}

/// Shows what the commands print; returns their status.
fn follow(console: &Receiver<Vec<u8>>, deadline: Instant) -> Result<i32> {
    let mut began = false;
    loop {
        let line = match console.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => bail!("the machine took too long (--patience)"),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine stopped before its commands ended"),
        };
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if let Some(status) = text.strip_prefix(STATUS) {
            return status.parse().context("the exit status of the commands");
        }
        if began || text.contains("Kernel panic") {
            println!("{text}");
        }
        began |= text.ends_with(BEGINS);
    }
}

/// Serves this machine's files at `socket`.
fn share_files(socket: &str) -> Result<Stopped> {
    let program = VIRTIOFSD.into_iter().find(|path| Path::new(path).exists());
    let program = program.context("there is no virtiofsd: run `cargo xtask setup`")?;
    let mut daemon = bound_to_us(program);
    daemon.arg(format!("--socket-path={socket}"));
    daemon.args(["-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"]);
    daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut files = Stopped(daemon.spawn().with_context(|| format!("start {program}"))?);
    while !Path::new(socket).exists() {
        if let Some(status) = files.0.try_wait()? {
            bail!("{program}: {status}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(files)
}

/// A command that ends when this process does.
fn bound_to_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", program]);
    command
}

/// A process that ends with its owner.
struct Stopped(Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A path as the kernel's command line and QEMU's options can have it.
fn plain(path: &Path) -> Result<&str> {
    let text = path.to_str().filter(|text| !text.contains([' ', ',', '"']));
    let text = text.with_context(|| format!("{}: spaces and commas cannot be passed on", path.display()))?;
    ensure!(path.is_absolute(), "{text} is not absolute");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_what_the_machine_says_at_its_end() {
        let console = |text: &str| {
            let (lines, console) = channel();
            text.lines().for_each(|line| lines.send(line.into()).unwrap());
            drop(lines);
            follow(&console, Instant::now() + Duration::from_secs(1))
        };
        let end = console("SeaBIOS\r\n\x1b[2Jpclive-vm: begins\r\nok\r\npclive-vm: status 3\r\nreboot\r\n");
        assert_eq!(end.unwrap(), 3);
        console("pclive-vm: begins\r\nKernel panic - not syncing\r\n").unwrap_err();
    }

    #[test]
    fn a_machine_that_hangs_is_not_waited_for() {
        let (_lines, console) = channel();
        let error = follow(&console, Instant::now()).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
