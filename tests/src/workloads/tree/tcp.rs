//! TCP connections with both ends inside the container, and unread bytes in them.

use super::probe::{Findings, Probe};
use super::queues::{Flow, STEP, UNREAD};
use nix::sys::socket::{GetSockOpt, SetSockOpt, getsockopt, setsockopt, sockopt};
use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

const KEEP_IDLE: u32 = 1234;
const RECEIVE_BUFFER: usize = 100_000;

/// See the module.
#[derive(Debug)]
pub struct Tcp {
    listener: TcpListener,
    address: SocketAddr,
    streams: (TcpStream, TcpStream),
    forth: Flow,
    back: Flow,
    /// One end has said all; it still hears.
    half_closed: (TcpStream, TcpStream),
    receive_buffer: usize,
}

impl Tcp {
    /// Makes and fills them.
    ///
    /// # Errors
    /// Those of the calls that make them.
    pub fn new() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let connect = || Ok::<_, io::Error>((TcpStream::connect(address)?, listener.accept()?.0));
        let (mut streams, half_closed) = (connect()?, connect()?);
        streams.0.set_nodelay(true)?;
        setsockopt(&streams.0, sockopt::KeepAlive, &true)?;
        setsockopt(&streams.0, sockopt::TcpKeepIdle, &KEEP_IDLE)?;
        setsockopt(&streams.1, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        (&half_closed.0).write_all(b"last words")?;
        half_closed.0.shutdown(Shutdown::Write)?;
        Ok(Tcp {
            receive_buffer: getsockopt(&streams.1, sockopt::RcvBuf)?,
            forth: Flow::start(31, &mut streams.0)?,
            back: Flow::start(32, &mut streams.1)?,
            streams,
            half_closed,
            listener,
            address,
        })
    }

    fn check_streams(&mut self, findings: &mut Findings) -> io::Result<()> {
        let (one, two) = (&self.streams.0, &self.streams.1);
        for (flow, mut to, mut from) in [(&mut self.forth, two, one), (&mut self.back, one, two)] {
            let mut found = vec![0; UNREAD + 1];
            to.set_nonblocking(true)?;
            let result = to.peek(&mut found);
            to.set_nonblocking(false)?;
            let length = result?;
            let right = found[..length] == flow.unread();
            findings.that(right, format!("{length} wrong unread bytes in a connection"));
            if length >= STEP {
                flow.advance(&mut to, &mut from, findings)?;
            }
        }
        findings.equal("address of a peer", one.local_addr()?, two.peer_addr()?);
        findings.equal("address of the listener", self.address, self.listener.local_addr()?);
        findings.equal("TCP_NODELAY", true, one.nodelay()?);
        option(findings, "SO_KEEPALIVE", one, sockopt::KeepAlive, true)?;
        option(findings, "TCP_KEEPIDLE", one, sockopt::TcpKeepIdle, KEEP_IDLE)?;
        option(findings, "SO_RCVBUF", two, sockopt::RcvBuf, self.receive_buffer)
    }

    fn check_half_closed(&mut self, findings: &mut Findings) -> io::Result<()> {
        let (speechless, heir) = (&self.half_closed.0, &self.half_closed.1);
        let mut found = [0; 64];
        let length = heir.peek(&mut found)?;
        findings.equal(
            "bytes before the end",
            "last words".into(),
            String::from_utf8_lossy(&found[..length]),
        );
        findings
            .that((&*speechless).write(b"x").is_err(), "a connection that was shut down can be written to");
        let (mut speechless, mut heir) = (speechless, heir);
        heir.write_all(b"heard")?;
        let mut answer = [0; 5];
        speechless.read_exact(&mut answer)?;
        findings.equal("bytes in the other direction", *b"heard", answer);
        Ok(())
    }

    /// The listener takes a new connection.
    fn check_listener(&mut self, findings: &mut Findings) -> io::Result<()> {
        let mut client = TcpStream::connect(self.address)?;
        let (mut server, peer) = self.listener.accept()?;
        findings.equal("address of a new client", client.local_addr()?, peer);
        client.write_all(b"new")?;
        let mut found = [0; 3];
        server.read_exact(&mut found)?;
        findings.equal("bytes of a new client", *b"new", found);
        Ok(())
    }
}

fn option<O: GetSockOpt<Val = T> + SetSockOpt, T: PartialEq + Debug>(
    findings: &mut Findings,
    name: &str,
    socket: &impl AsFd,
    option: O,
    expected: T,
) -> io::Result<()> {
    findings.equal(name, expected, getsockopt(socket, option)?);
    Ok(())
}

impl Probe for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn check(&mut self, findings: &mut Findings) {
        for part in [Self::check_streams, Self::check_half_closed, Self::check_listener] {
            let result = part(self, findings);
            findings.succeed("use a connection", result);
        }
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = self.streams.1.read(&mut [0]);
    }
}
