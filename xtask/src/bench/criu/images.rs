//! CRIU's images on their way: everything but the pages, which its page server takes, has to be copied.

use std::fs;
use std::io::{BufReader, BufWriter, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use pclive_tests::lab::Netns;

/// A file system in memory that every Linux has.
const MEMORY: &str = "/dev/shm";
/// What directories of images are called; the number of their process follows.
const PREFIX: &str = "pclive-bench-";

/// Directories in memory for the images of one migration. They are removed when dropped.
#[derive(Debug)]
pub struct Images {
    all: tempfile::TempDir,
}

impl Images {
    /// New ones. Those of processes that have died are removed.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new() -> Result<Self> {
        sweep();
        let prefix = format!("{PREFIX}{}-", Pid::this());
        let all = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(MEMORY)
            .context("make a directory for images")?;
        let images = Self { all };
        for dir in [images.source(), images.destination()] {
            fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(images)
    }

    /// What the source has.
    pub fn source(&self) -> PathBuf {
        self.all.path().join("source")
    }

    /// What the destination has.
    pub fn destination(&self) -> PathBuf {
        self.all.path().join("destination")
    }

    /// A file beside the images.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.all.path().join(name)
    }
}

/// Removes what killed benchmarks have left in memory.
fn sweep() {
    for entry in fs::read_dir(MEMORY).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid =
            name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid.to_owned());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whoever removed it first has done the work.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Bytes of the files in `dir`.
pub fn size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}

/// Copies the files of `from` into `to` over a connection from one host's network to another's. Returns how many bytes
/// that were.
///
/// # Errors
/// When a file or the connection fails.
pub fn copy(from: (&Netns, &Path), to: (&Netns, &Path), address: SocketAddr) -> Result<u64> {
    let listener =
        to.0.enter(|| TcpListener::bind(address))?.with_context(|| format!("listen on {address}"))?;
    let address = listener.local_addr()?;
    let stream =
        from.0.enter(|| TcpStream::connect(address))?.with_context(|| format!("connect to {address}"))?;
    let (other, _) = listener.accept().context("accept")?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(other, to.1));
        let sent = send(stream, from.1);
        receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        sent
    })
}

/// Sends each file as the length of its name, its own length, its name, its contents.
fn send(stream: TcpStream, dir: &Path) -> Result<u64> {
    let mut stream = BufWriter::new(stream);
    let mut sent = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().into_encoded_bytes();
        let contents = fs::read(entry.path()).with_context(|| format!("read {}", entry.path().display()))?;
        let lengths = [name.len() as u64, contents.len() as u64];
        for bytes in [&lengths[0].to_be_bytes()[..], &lengths[1].to_be_bytes(), &name, &contents] {
            stream.write_all(bytes).context("send an image")?;
            sent += bytes.len() as u64;
        }
    }
    stream.flush().context("send images")?;
    Ok(sent)
}

fn receive(stream: TcpStream, dir: &Path) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut lengths = [0; 16];
    while stream.read_exact(&mut lengths[..1]).is_ok() {
        stream.read_exact(&mut lengths[1..]).context("receive an image")?;
        let (name, contents) = lengths.split_at(8);
        let length = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("it was split in halves"));
        let mut take = |length: u64| {
            let mut bytes = Vec::new();
            (&mut stream).take(length).read_to_end(&mut bytes).context("receive an image")?;
            ensure!(bytes.len() as u64 == length, "an image ends early");
            Ok(bytes)
        };
        let name = String::from_utf8(take(length(name))?).context("the name of an image")?;
        ensure!(!name.contains('/') && name != "..", "an image called {name}");
        let contents = take(length(contents))?;
        fs::write(dir.join(&name), contents).with_context(|| format!("write {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        let images = Images::new().expect("a directory in memory");
        fs::write(images.source().join("core-1.img"), [7; 5000]).expect("a file");
        fs::write(images.source().join("empty.img"), []).expect("a file");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (other, _) = listener.accept().expect("a connection");
        let sent = send(stream, &images.source()).expect("sent");
        receive(other, &images.destination()).expect("received");
        assert_eq!(fs::read(images.destination().join("core-1.img")).expect("a file"), [7; 5000]);
        assert_eq!(size(&images.destination()), 5000);
        assert_eq!(sent, 5000 + 2 * 16 + "core-1.img".len() as u64 + "empty.img".len() as u64);
    }
}
