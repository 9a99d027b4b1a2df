use super::*;
use pclive_wire::page_frame::RunKind;
use pclive_wire::{PAGE_SIZE, PageRange, VirtAddr};
use std::io::Write;
use std::net::TcpListener;
use std::thread;

fn pair() -> (TcpStream, TcpStream, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let sender = TcpStream::connect(address).unwrap();
    (sender, listener.accept().unwrap().0, address)
}

fn ends() -> (PageSender, PageReceiver) {
    let (sender, receiver, address) = pair();
    (
        PageSender::new(sender, address, Pace::new(None)).unwrap(),
        PageReceiver::new(receiver, address).unwrap(),
    )
}

fn run(start: u64, pages: u64, kind: RunKind) -> PageRun {
    PageRun { range: PageRange::new(VirtAddr(start * PAGE_SIZE), pages), kind }
}

/// Sends one batch of `pages` pages, each filled with bytes that tell `seed` and the page apart.
fn send(sender: &mut PageSender, seed: u64, pages: u64) {
    let mut buffer = sender.buffer().unwrap();
    for (i, page) in buffer.contents_mut().chunks_mut(4096).take(pages as usize).enumerate() {
        page.fill((seed * 31 + i as u64) as u8);
    }
    let runs = [run(16, pages, RunKind::Raw), run(16 + pages, 3, RunKind::Zero)];
    sender.send(NsPid(7), &runs, buffer).unwrap();
}

fn check(batch: &Batch, seed: u64, pages: u64) {
    assert_eq!(batch.runs().len(), 2);
    assert_eq!(batch.contents().as_ptr() as usize % 4096, 0);
    let pieces: Vec<_> = batch.pieces().collect();
    assert_eq!((pieces[0].1.len(), pieces[1].1.len()), (pages as usize * 4096, 0));
    for (i, page) in pieces[0].1.chunks(4096).enumerate() {
        assert!(page.iter().all(|&b| b == (seed * 31 + i as u64) as u8), "batch {seed} page {i}");
    }
}

#[test]
fn batches_arrive_whole_and_in_order_with_buffers_being_reused() {
    let (mut sender, mut receiver) = ends();
    const BATCHES: u64 = 50;
    let sending = thread::spawn(move || {
        for seed in 0..BATCHES {
            send(&mut sender, seed, 1 + seed * 5);
            if seed % 10 == 9 {
                sender.barrier().unwrap();
            }
        }
        sender.flush().unwrap();
        sender
    });
    for seed in 0..BATCHES {
        match receiver.recv().unwrap() {
            PageEvent::Batch(batch) => {
                assert_eq!((batch.process, batch.round), (NsPid(7), Round((seed / 10) as u32)));
                check(&batch, seed, 1 + seed * 5);
            }
            PageEvent::Barrier(round) => panic!("barrier {round} instead of batch {seed}"),
        }
        if seed % 10 == 9 {
            assert!(matches!(receiver.recv(), Ok(PageEvent::Barrier(Round(r))) if u64::from(r) == seed / 10));
        }
    }
    let sender = sending.join().unwrap();
    assert!(matches!(receiver.stream.set_nonblocking(true), Ok(())));
    let stats = sender.stats();
    let pages: u64 = (0..BATCHES).map(|seed| 1 + seed * 5).sum();
    assert_eq!(stats.bytes, pages * 4096 + BATCHES * (16 + 32) + 5 * 16);
    // On loopback the kernel copies, and the sender has noticed.
    assert!(stats.zerocopy_copied >= 8, "{stats:?}");
    assert!(!sender.in_flight.wanted(), "{stats:?}");
    assert!(stats.zerocopy_sends < stats.sends, "{stats:?}");
}

#[test]
fn scattered_pages_fill_a_batch() {
    let (mut sender, mut receiver) = ends();
    let mut buffer = sender.buffer().unwrap();
    buffer.contents_mut()[255 * 4096] = 9;
    let runs: Vec<_> = (0..256).map(|i| run(16 + 2 * i, 1, RunKind::Raw)).collect();
    sender.send(NsPid(7), &runs, buffer).unwrap();
    let PageEvent::Batch(batch) = receiver.recv().unwrap() else { panic!("no batch") };
    let last = batch.pieces().last().unwrap();
    assert_eq!((last.0, last.1[0]), (runs[255], 9));
}

#[test]
fn a_batch_without_contents_needs_no_pages() {
    let (mut sender, mut receiver) = ends();
    let buffer = sender.buffer().unwrap();
    let runs = [run(16, 1000, RunKind::Zero), run(5000, 1, RunKind::Absent)];
    sender.send(NsPid(1), &runs, buffer).unwrap();
    let PageEvent::Batch(batch) = receiver.recv().unwrap() else { panic!("no batch") };
    assert_eq!((batch.runs(), batch.contents().len()), (&runs[..], 0));
    assert_eq!(batch.keep().unwrap().contents().len(), 0);
}

#[test]
fn the_receiver_stops_reading_when_its_buffers_are_out_and_keeping_frees_them() {
    let (mut sender, mut receiver) = ends();
    let sending = thread::spawn(move || (0..40).for_each(|seed| send(&mut sender, seed, 256)));
    let mut batch = |seed| match receiver.recv().unwrap() {
        PageEvent::Batch(batch) => {
            check(&batch, seed, 256);
            batch
        }
        PageEvent::Barrier(round) => panic!("barrier {round}"),
    };
    let held: Vec<_> = (0..BUFFERS as u64).map(&mut batch).collect();
    thread::sleep(Duration::from_millis(50));
    assert!(!sending.is_finished(), "40 MiB fit into no socket buffer");
    let kept: Vec<_> = held.into_iter().map(|batch| batch.keep().unwrap()).collect();
    for seed in BUFFERS as u64..40 {
        batch(seed);
    }
    sending.join().unwrap();
    for (seed, batch) in (0..).zip(&kept) {
        check(batch, seed, 256);
    }
}

#[test]
fn hanging_up_ends_waiting_at_both_ends() {
    let (mut sender, mut receiver) = ends();
    let hangup = receiver.hangup().unwrap();
    let waiting = thread::spawn(move || receiver.recv().map(|_| ()));
    thread::sleep(Duration::from_millis(20));
    hangup.hang_up();
    assert!(matches!(waiting.join().unwrap(), Err(Error::Closed(_))));
    let failed = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(1));
        sender.barrier().is_err()
    });
    assert!(failed);

    let (mut sender, receiver) = ends();
    let hangup = sender.hangup().unwrap();
    let mut fill = move || {
        let buffer = sender.buffer()?;
        sender.send(NsPid(1), &[run(16, 256, RunKind::Raw)], buffer)
    };
    let filling = thread::spawn(move || while fill().is_ok() {});
    thread::sleep(Duration::from_millis(50));
    assert!(!filling.is_finished(), "nobody reads");
    hangup.hang_up();
    filling.join().unwrap();
    drop(receiver);
}

#[test]
fn malformed_frames_are_refused() {
    let batch = |runs: &[PageRun]| {
        let mut head = [0; MAX_HEAD_LEN];
        let (_, len) = encode_batch(NsPid(1), Round(0), runs, &mut head).unwrap();
        head[..len].to_vec()
    };
    let good = batch(&[run(16, 1, RunKind::Raw)]);
    let mut unaligned = good.clone();
    unaligned[HEADER_LEN] = 1;
    let mut other_round = good.clone();
    other_round[12] = 1;
    let mut cut = good.clone();
    cut.extend([0; 100]);
    for (bytes, malformed) in [
        (b"HTTP/1.1 400 Bad".to_vec(), true),
        (unaligned, true),
        (other_round, true),
        (cut, false),
        (good[..20].to_vec(), false),
    ] {
        let (mut raw, receiver, address) = pair();
        let mut receiver = PageReceiver::new(receiver, address).unwrap();
        raw.write_all(&bytes).unwrap();
        drop(raw);
        let error = receiver.recv().unwrap_err();
        assert_eq!(matches!(error, Error::PageFrame { .. }), malformed, "{error:?}");
        assert_eq!(matches!(error, Error::Closed(_)), !malformed, "{error:?}");
    }
}

#[test]
fn a_pace_is_kept() {
    let (sender, receiver, address) = pair();
    let pace = Pace::new(Some(20 << 20));
    let (mut sender, mut receiver) =
        (PageSender::new(sender, address, pace).unwrap(), PageReceiver::new(receiver, address).unwrap());
    let reading = thread::spawn(move || (0..4).for_each(|_| drop(receiver.recv().unwrap())));
    let begin = std::time::Instant::now();
    (0..4).for_each(|seed| send(&mut sender, seed, 256));
    // 4 MiB at 20 MiB/s, less the burst.
    assert!(begin.elapsed() > Duration::from_millis(150), "{:?}", begin.elapsed());
    reading.join().unwrap();
}
