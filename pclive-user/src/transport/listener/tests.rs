use super::*;
use crate::transport::pages::{PageEvent, PageSender};
use crate::transport::{ControlChannel, Pace, SourceChannel};
use pclive_wire::Round;
use pclive_wire::control::{Accepted, ApplyMode, Message, RunningReport, SourceMessage};
use pclive_wire::facts::HostFacts;
use std::io::{Read, Write};
use std::sync::mpsc::{Sender, channel};
use std::thread;

const SOON: Duration = Duration::from_secs(5);

fn proposal(container: &str, page_streams: u16) -> Proposal {
    let (apply, restore_from) = (ApplyMode::OnArrival, Round(0));
    Proposal { container: container.into(), apply, restore_from, page_streams, facts: HostFacts::default() }
}

/// A server whose migrations run `migrate`.
struct Server {
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(migrate: impl Fn(Incoming) + Send + Sync + 'static) -> Self {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, address) = channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
                ready.send(listener.address()).unwrap();
                listener.serve(migrate, async { drop(stopped.await) }).await.unwrap();
            });
        });
        Self { address: address.recv().unwrap(), stop: Some(stop), thread: Some(thread) }
    }

    fn connect(&self, proposal: Proposal) -> Result<(SourceChannel, Accepted)> {
        SourceChannel::connect(self.address, proposal, Cancellation::new().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn accept(incoming: &mut Incoming) {
    let accepted = Accepted { token: incoming.session.token(), facts: HostFacts::default() };
    incoming.channel.send(&DestinationMessage::Accepted(accepted)).unwrap();
}

/// Takes the page streams, then waits for the commit and says how many barriers there were on stream 0.
fn count_barriers(mut incoming: Incoming) {
    accept(&mut incoming);
    let mut streams = incoming.session.streams(SOON, &mut incoming.channel).unwrap();
    assert_eq!(incoming.channel.recv(SOON).unwrap(), SourceMessage::Commit);
    let mut barriers = 0;
    while let Ok(PageEvent::Barrier(_)) = streams[0].recv() {
        barriers += 1;
    }
    let report = RunningReport { restore_us: barriers, ..Default::default() };
    incoming.channel.send(&DestinationMessage::Running(Box::new(report))).unwrap();
}

#[test]
fn migrations_run_side_by_side_each_with_its_own_streams() {
    let server = Server::start(count_barriers);
    let mut sources: Vec<_> = (0..4u64)
        .map(|barriers| {
            let (channel, accepted) = server.connect(proposal("a", 2)).unwrap();
            (channel, accepted.token, barriers)
        })
        .collect();
    for (channel, token, barriers) in &mut sources {
        // Streams may come in any order.
        let _second = PageSender::connect(server.address, *token, 1, Pace::new(None)).unwrap();
        let mut first = PageSender::connect(server.address, *token, 0, Pace::new(None)).unwrap();
        (0..*barriers).for_each(|_| first.barrier().unwrap());
        channel.send(&SourceMessage::Commit).unwrap();
    }
    for (channel, _, barriers) in &mut sources {
        match channel.recv(SOON).unwrap() {
            DestinationMessage::Running(report) => assert_eq!(report.restore_us, *barriers),
            other => panic!("{other:?}"),
        }
        assert!(matches!(channel.recv(SOON), Err(Error::Closed(_))));
    }
}

#[test]
fn a_bad_proposal_is_refused_with_its_reason() {
    let server = Server::start(|_| panic!("nothing should begin"));
    let error = server.connect(proposal("../../etc", 1)).unwrap_err();
    assert!(matches!(error, Error::Refused { source: RemoteError::Proposal(_), .. }), "{error:?}");
}

#[test]
fn another_version_is_told_ours() {
    let server = Server::start(|_| panic!("nothing should begin"));
    let mut stream = TcpStream::connect(server.address).unwrap();
    // Its message stays unread, and the answer comes all the same.
    stream.write_all(b"PCLV\x07\x00\x00\x00\x05\x00\x00\x00hello").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let expected = DestinationMessage::Rejected(RemoteError::Version { ours: codec::VERSION, theirs: 7 });
    assert_eq!(codec::decode::<DestinationMessage>(&answer[codec::HEADER_LEN..]).unwrap(), expected);
}

#[test]
fn strangers_are_shown_out_and_silent_ones_keep_nobody_waiting() {
    let server = Server::start(|mut incoming| accept(&mut incoming));
    let _silent = TcpStream::connect(server.address).unwrap();
    let endless = [&b"PCLV"[..], &codec::VERSION.to_le_bytes(), b"\x00\x00\xff\xff\xff\x7f"].concat();
    for greeting in [&b"GET / HTTP/1.0\r\n\r\n"[..], &endless] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all(greeting).unwrap();
        // End or reset, according to whether everything had been read.
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0);
    }
    // A page stream of no migration is closed.
    let mut lost = PageSender::connect(server.address, SessionToken([7; 16]), 0, Pace::new(None)).unwrap();
    let refused = (0..1000).any(|_| {
        thread::sleep(Duration::from_millis(2));
        lost.barrier().is_err()
    });
    assert!(refused);
    server.connect(proposal("a", 1)).unwrap();
}

#[test]
fn only_the_streams_that_were_proposed_are_taken() {
    let (say, said) = channel();
    let server = Server::start(move |mut incoming| {
        accept(&mut incoming);
        let streams = incoming.session.streams(Duration::from_millis(300), &mut incoming.channel);
        say.send(streams.map(|streams| streams.len())).unwrap();
    });
    for (indices, outcome) in [(&[0u16, 1][..], "ok"), (&[0], "late"), (&[0, 0], "odd"), (&[0, 2], "odd")] {
        let (_channel, accepted) = server.connect(proposal("a", 2)).unwrap();
        let open = |&i| PageSender::connect(server.address, accepted.token, i, Pace::new(None)).unwrap();
        let _streams: Vec<_> = indices.iter().map(open).collect();
        let got = match said.recv().unwrap() {
            Ok(2) => "ok",
            Err(Error::TimedOut { .. }) => "late",
            Err(Error::Unexpected { .. }) => "odd",
            other => panic!("{other:?}"),
        };
        assert_eq!(got, outcome, "{indices:?}");
    }
}

#[test]
fn the_streams_of_a_source_that_has_gone_are_not_waited_for() {
    let (say, said) = channel();
    let server = Server::start(move |mut incoming| {
        accept(&mut incoming);
        say.send(incoming.session.streams(Duration::from_secs(60), &mut incoming.channel).map(drop)).unwrap();
    });
    drop(server.connect(proposal("a", 1)).unwrap());
    assert!(matches!(said.recv_timeout(SOON).unwrap(), Err(Error::Closed(_))));
}

#[test]
fn the_end_of_the_server_cancels_what_is_under_way() {
    let (say, said): (Sender<Result<SourceMessage>>, _) = channel();
    let server = Server::start(move |mut incoming| {
        accept(&mut incoming);
        say.send(incoming.channel.recv(Duration::from_secs(60))).unwrap();
    });
    let (_channel, _) = server.connect(proposal("a", 1)).unwrap();
    drop(server);
    assert!(matches!(said.recv().unwrap(), Err(Error::Cancelled)));
}

/// Two ends of a control stream, without a listener.
fn channels() -> (SourceChannel, DestinationChannel, Cancellation) {
    fn end<O: Message, I: Message>(
        stream: TcpStream,
        cancellation: Cancellation,
    ) -> (ControlChannel<O, I>, Cancellation) {
        let peer = stream.peer_addr().unwrap();
        (ControlChannel::new(stream, peer, cancellation.clone()).unwrap(), cancellation)
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (source, cancellation) = end(stream, Cancellation::new().unwrap());
    let (destination, _) = end(listener.accept().unwrap().0, Cancellation::new().unwrap());
    (source, destination, cancellation)
}

#[test]
fn a_message_that_does_not_come_is_waited_for_no_longer_than_asked() {
    let (mut source, mut destination, _) = channels();
    let limit = Duration::from_millis(30);
    let begin = Instant::now();
    assert!(matches!(source.recv(limit), Err(Error::TimedOut { .. })));
    assert!((limit..SOON).contains(&begin.elapsed()));
    assert!(matches!(source.try_recv(), Ok(None)));
    destination.send(&DestinationMessage::Ready).unwrap();
    assert_eq!(source.recv(SOON).unwrap(), DestinationMessage::Ready);
    drop(destination);
    assert!(matches!(source.recv(SOON), Err(Error::Closed(_))));
}

#[test]
fn a_cancellation_ends_waiting_but_lets_the_peer_be_told_and_heard_out() {
    let (mut source, mut destination, cancellation) = channels();
    let waiting = thread::spawn(move || (source.recv(Duration::from_secs(60)), source));
    thread::sleep(Duration::from_millis(20));
    cancellation.cancel();
    cancellation.cancel();
    let (result, mut source) = waiting.join().unwrap();
    assert!(matches!(result, Err(Error::Cancelled)));

    source.send(&SourceMessage::Destroyed).unwrap();
    assert_eq!(destination.recv(SOON).unwrap(), SourceMessage::Destroyed);
    source.shield();
    destination.send(&DestinationMessage::Removed).unwrap();
    assert_eq!(source.recv(SOON).unwrap(), DestinationMessage::Removed);
}

#[test]
fn the_last_words_arrive_although_something_is_unread() {
    let (mut source, mut destination, _) = channels();
    source.send(&SourceMessage::Commit).unwrap();
    destination.send(&DestinationMessage::Ready).unwrap();
    let finishing = thread::spawn(move || destination.finish(SOON));
    // The source goes on talking for a while.
    thread::sleep(Duration::from_millis(20));
    source.send(&SourceMessage::Commit).unwrap();
    assert_eq!(source.recv(SOON).unwrap(), DestinationMessage::Ready);
    assert!(matches!(source.recv(SOON), Err(Error::Closed(_))));
    drop(source);
    finishing.join().unwrap();
}

#[test]
fn a_large_message_arrives_whole_and_leaves_no_large_inbox() {
    let (mut source, mut destination, _) = channels();
    let reason = pclive_wire::control::Failure { chain: vec!["x".repeat(5 << 20)], errno: None };
    let message = SourceMessage::Abort(pclive_wire::control::AbortReason::Failed(reason));
    let sending = thread::spawn({
        let message = message.clone();
        move || {
            source.send(&message).unwrap();
            source.send(&SourceMessage::Commit).unwrap();
        }
    });
    assert_eq!(destination.recv(SOON).unwrap(), message);
    assert_eq!(destination.recv(SOON).unwrap(), SourceMessage::Commit);
    sending.join().unwrap();
}

#[test]
fn a_manifest_is_checked_on_arrival() {
    let (mut source, mut destination, _) = channels();
    let manifest = pclive_wire::manifest::Manifest {
        round: Round(0),
        keep_awake: false,
        last: false,
        nice: 0,
        processes: Vec::new(),
        descriptions: Vec::new(),
    };
    source.send(&SourceMessage::Manifest(Box::new(manifest))).unwrap();
    assert!(matches!(destination.recv(SOON), Err(Error::Manifest { .. })));
}
