//! The destination's door: takes connections, hears what each one is, and brings it to where it belongs.
//!
//! Connections are strangers until their first message has been read; there may be many of them, slow or silent, and
//! they get little memory and little time. A control connection becomes a migration with a thread of its own; a page
//! stream goes to the migration whose token it shows. Any number of migrations run side by side.

use super::cancel::Cancellation;
use super::control::{DestinationChannel, OPENING};
use super::error::{Error, Result, socket};
use super::pages::PageReceiver;
use pclive_wire::codec::{self, CodecError};
use pclive_wire::control::{DestinationMessage, Failure, Open, Proposal, RemoteError, SessionToken};
use pclive_wire::limits::MAX_OPEN_PAYLOAD;
use std::collections::HashMap;
use std::future::Future;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::sync::Semaphore;

/// Connections that have not said what they are, at most; more wait in the kernel's backlog.
const MAX_STRANGERS: usize = 64;
/// How often a wait for page streams looks whether somebody has ended the migration.
const END_CHECK: Duration = Duration::from_millis(100);

/// A migration that a source proposes.
#[derive(Debug)]
pub struct Incoming {
    /// What it proposes, checked.
    pub proposal: Proposal,
    /// The control stream. The answer to the proposal is yet to be sent.
    pub channel: DestinationChannel,
    /// Where the page streams will arrive.
    pub session: Session,
    /// Cancelled when the server ends.
    pub cancellation: Cancellation,
}

/// The page streams of one migration; its token is valid as long as this exists.
#[derive(Debug)]
pub struct Session {
    token: SessionToken,
    expected: u16,
    peer: SocketAddr,
    arrivals: Receiver<(u16, TcpStream)>,
    cancellation: Cancellation,
    sessions: Sessions,
}

impl Session {
    /// What the source needs to open page streams.
    pub fn token(&self) -> SessionToken {
        self.token
    }

    /// Waits until all page streams that were proposed have arrived; they come in the order of their numbers. A source
    /// that ends its control stream is not waited for.
    pub fn streams(&self, limit: Duration, control: &mut DestinationChannel) -> Result<Vec<PageReceiver>> {
        let deadline = Instant::now() + limit;
        let mut streams: Vec<Option<PageReceiver>> = (0..self.expected).map(|_| None).collect();
        while streams.iter().any(Option::is_none) {
            self.cancellation.check()?;
            control.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::TimedOut { what: "page stream", peer: self.peer, limit });
            }
            // In short waits, to notice that it is over.
            let Ok((index, stream)) = self.arrivals.recv_timeout(left.min(END_CHECK)) else {
                continue;
            };
            match streams.get_mut(usize::from(index)) {
                Some(slot @ None) => *slot = Some(PageReceiver::new(stream, self.peer)?),
                _ => {
                    let message = format!("page stream {index} of {}", self.expected);
                    return Err(Error::Unexpected { peer: self.peer, message });
                }
            }
        }
        Ok(streams.into_iter().flatten().collect())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sessions.lock().remove(&self.token);
    }
}

/// Where the page streams of each session go, with their numbers.
type Arrivals = HashMap<SessionToken, SyncSender<(u16, TcpStream)>>;

/// The sessions that exist.
#[derive(Clone, Debug, Default)]
struct Sessions(Arc<Mutex<Arrivals>>);

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Arrivals> {
        // A map is valid whatever happened to the thread that held it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, expected: u16, peer: SocketAddr, cancellation: Cancellation) -> Result<Session> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| Error::Local("get random bytes", error.into()))?;
        let token = SessionToken(random);
        // Streams beyond the expected ones are turned away.
        let (arrive, arrivals) = sync_channel(expected.into());
        self.lock().insert(token, arrive);
        Ok(Session { token, expected, peer, arrivals, cancellation, sessions: self.clone() })
    }

    /// Whether the stream was wanted.
    fn deliver(&self, token: SessionToken, index: u16, stream: TcpStream) -> bool {
        self.lock().get(&token).is_some_and(|arrive| arrive.try_send((index, stream)).is_ok())
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    tcp: tokio::net::TcpListener,
    address: SocketAddr,
}

/// What every connection's task needs.
struct Door<F> {
    sessions: Sessions,
    cancellation: Cancellation,
    migrate: F,
    migrations: Mutex<Vec<JoinHandle<()>>>,
}

impl Listener {
    /// Listens at `address`; port 0 takes a free port.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        let failed = |source| Error::Listen { address, source };
        let tcp = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
        let address = tcp.local_addr().map_err(failed)?;
        Ok(Self { tcp, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes connections until `stop` completes, and runs `migrate` for every migration, in a thread of its own. Then
    /// cancels the migrations that are still under way and waits for them.
    pub async fn serve<F>(self, migrate: F, stop: impl Future<Output = ()>) -> Result
    where
        F: Fn(Incoming) + Send + Sync + 'static,
    {
        let cancellation = Cancellation::new()?;
        let (sessions, migrations) = (Sessions::default(), Mutex::default());
        let door = Arc::new(Door { sessions, cancellation: cancellation.clone(), migrate, migrations });
        tokio::select! {
            () = self.accept_all(&door) => {}
            () = stop => {}
        }
        cancellation.cancel();
        let migrations = std::mem::take(&mut *door.migrations.lock().unwrap_or_else(PoisonError::into_inner));
        let join_all = move || migrations.into_iter().filter_map(|migration| migration.join().err()).count();
        match tokio::task::spawn_blocking(join_all).await {
            Ok(0) => Ok(()),
            panicked => {
                tracing::error!("migrations that panicked: {panicked:?}");
                Ok(())
            }
        }
    }

    async fn accept_all<F>(&self, door: &Arc<Door<F>>)
    where
        F: Fn(Incoming) + Send + Sync + 'static,
    {
        let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
        loop {
            // The semaphore is never closed.
            let Ok(permit) = strangers.clone().acquire_owned().await else { return };
            let (stream, peer) = match self.tcp.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, or a connection that is gone already: neither concerns the next one for long.
                    tracing::warn!("accept on {}: {error}", self.address);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let door = door.clone();
            tokio::spawn(async move {
                if let Err(error) = door.let_in(stream, peer).await {
                    tracing::warn!(%peer, "connection refused: {}", Failure::from_error(&error));
                }
                drop(permit);
            });
        }
    }
}

impl<F> Door<F>
where
    F: Fn(Incoming) + Send + Sync + 'static,
{
    async fn let_in(self: Arc<Self>, mut stream: tokio::net::TcpStream, peer: SocketAddr) -> Result {
        let open = tokio::time::timeout(OPENING, read_open(&mut stream, peer)).await;
        let stream = stream.into_std().map_err(socket("take over the connection of", peer))?;
        match open {
            Err(_) => Err(Error::TimedOut { what: "first message", peer, limit: OPENING }),
            Ok(Ok(Open::Control(proposal))) => self.begin(*proposal, stream, peer),
            Ok(Ok(Open::Pages { token, index })) => {
                stream.set_nonblocking(false).map_err(socket("configure the connection of", peer))?;
                if self.sessions.deliver(token, index, stream) {
                    Ok(())
                } else {
                    let message = format!("page stream {index} of no migration");
                    Err(Error::Unexpected { peer, message })
                }
            }
            Ok(Err(error)) => {
                if let Error::Frame { source: CodecError::Version { theirs }, .. } = error {
                    let channel = DestinationChannel::new(stream, peer, self.cancellation.clone())?;
                    let refusal = RemoteError::Version { ours: codec::VERSION, theirs };
                    // Their message has not been read, so the answer takes its time to be heard.
                    tokio::task::spawn_blocking(move || reject(channel, refusal));
                }
                Err(error)
            }
        }
    }

    /// Starts a migration's thread.
    fn begin(self: &Arc<Self>, proposal: Proposal, stream: TcpStream, peer: SocketAddr) -> Result {
        let channel = DestinationChannel::new(stream, peer, self.cancellation.clone())?;
        if let Err(error) = proposal.validate() {
            tokio::task::spawn_blocking(move || reject(channel, RemoteError::Proposal(error)));
            return Ok(());
        }
        let session = self.sessions.open(proposal.page_streams, peer, self.cancellation.clone())?;
        let incoming = Incoming { proposal, channel, session, cancellation: self.cancellation.clone() };
        // A thread's name has 15 bytes; what is beyond is cut by the kernel.
        let name = format!("m:{}", incoming.proposal.container);
        let door = self.clone();
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || (door.migrate)(incoming))
            .map_err(|source| Error::Local("start a thread for a migration", source))?;
        let mut migrations = self.migrations.lock().unwrap_or_else(PoisonError::into_inner);
        migrations.retain(|migration| !migration.is_finished());
        migrations.push(thread);
        Ok(())
    }
}

/// Reads exactly the first message: what follows belongs to whoever takes the connection over.
async fn read_open(stream: &mut tokio::net::TcpStream, peer: SocketAddr) -> Result<Open> {
    let malformed = |source| Error::Frame { peer, source };
    let mut header = [0; codec::HEADER_LEN];
    stream.read_exact(&mut header).await.map_err(socket("receive from", peer))?;
    let mut payload = vec![0; codec::payload_length(&header, MAX_OPEN_PAYLOAD).map_err(malformed)?];
    stream.read_exact(&mut payload).await.map_err(socket("receive from", peer))?;
    codec::decode(&payload).map_err(malformed)
}

/// Says why a migration does not begin. If the source is gone, it does not need to know.
fn reject(mut channel: DestinationChannel, why: RemoteError) {
    tracing::warn!(peer = %channel.peer(), "migration refused: {}", Failure::from_error(&why));
    if channel.send(&DestinationMessage::Rejected(why)).is_ok() {
        channel.finish(OPENING);
    }
}

#[cfg(test)]
mod tests;
