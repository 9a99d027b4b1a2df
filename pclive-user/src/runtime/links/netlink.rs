//! A blocking rtnetlink socket (`rtnetlink(7)`): dumps, and requests in batches.
//!
//! Requests are made inside the blackout, so a batch is one `send(2)`: the kernel works it off, in order, before the
//! call returns, and the acknowledgements are then waiting to be read.

use super::LinkError;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Requests sent at once: their acknowledgements must fit the socket's receive buffer (some 270 by default).
const BATCH: usize = 64;

/// Attempts to get a dump during which nothing changed.
const DUMP_ATTEMPTS: usize = 8;

/// Every datagram that the kernel makes for a dump is at most this long (`netlink_dump` in net/netlink/af_netlink.c).
const DATAGRAM: usize = 64 << 10;

/// A change to be made.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// What is done, and to what, for an error's text.
    pub what: String,
    pub message: RouteNetlinkMessage,
    /// `NLM_F_CREATE` and so on.
    pub flags: u16,
    /// Answers that mean that there was nothing to do.
    pub accepted: &'static [Errno],
}

/// Tells of every change of links, addresses and routes in the network namespace of the thread that opened it.
pub(super) struct Monitor(Socket);

impl Monitor {
    pub fn open() -> io::Result<Self> {
        // RTMGRP_LINK, and RTMGRP_*_IFADDR and RTMGRP_*_ROUTE of both address families (linux/rtnetlink.h)
        const CHANGES: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, CHANGES))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Whether anything has changed since the last time, or since it was opened: the kernel tells before the call that
    /// makes a change returns. To be asked before looking at what there is.
    pub fn has_changed(&self) -> bool {
        let mut changed = false;
        loop {
            match self.0.recv(&mut &mut [0; 64][..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return changed,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Also when there was more to tell than the socket takes (ENOBUFS).
                _ => changed = true,
            }
        }
    }
}

/// A socket in the network namespace of the thread that opened it.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Acknowledgements without a copy of the request, so that many fit the receive buffer.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// One object; `None` if there is no such device.
    pub fn get(
        &mut self,
        what: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, LinkError> {
        let sequence = self.next_sequence();
        self.socket.send(&serialize(message, NLM_F_REQUEST, sequence), 0).map_err(failed(what))?;
        loop {
            for message in self.receive(what)? {
                match message.payload {
                    _ if message.header.sequence_number != sequence => (),
                    NetlinkPayload::InnerMessage(object) => return Ok(Some(object)),
                    NetlinkPayload::Error(error) if error.raw_code() == -(Errno::ENODEV as i32) => {
                        return Ok(None);
                    }
                    NetlinkPayload::Error(error) => return Err(failed(what)(error.to_io())),
                    _ => (),
                }
            }
        }
    }

    /// Every object of a kind.
    pub fn dump(
        &mut self,
        what: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, LinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.next_sequence();
            let request = serialize(message.clone(), NLM_F_REQUEST | NLM_F_DUMP, sequence);
            self.socket.send(&request, 0).map_err(failed(what))?;
            if let Some(objects) = self.read_dump(what, sequence)? {
                return Ok(objects);
            }
        }
        Err(LinkError::Unsettled { what })
    }

    /// Reads one dump; `None` if something changed meanwhile, so that it may be inconsistent.
    fn read_dump(
        &mut self,
        what: &'static str,
        sequence: u32,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, LinkError> {
        let (mut objects, mut consistent) = (Vec::new(), true);
        loop {
            for message in self.receive(what)? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(consistent.then_some(objects)),
                    NetlinkPayload::Error(error) => return Err(failed(what)(error.to_io())),
                    NetlinkPayload::InnerMessage(object) => objects.push(object),
                    _ => (),
                }
            }
        }
    }

    /// Makes changes, in order. A request that fails does not keep the others from being made; the first error counts.
    pub fn apply(&mut self, requests: &[Request]) -> Result<(), LinkError> {
        let mut result = Ok(());
        for batch in requests.chunks(BATCH) {
            let done = self.apply_batch(batch);
            result = result.and(done);
        }
        result
    }

    /// The same changes as datagrams, for somebody else to send through this socket.
    pub fn datagrams(&mut self, requests: &[Request]) -> Vec<Vec<u8>> {
        requests.chunks(BATCH).map(|batch| self.datagram(batch)).collect()
    }

    fn apply_batch(&mut self, batch: &[Request]) -> Result<(), LinkError> {
        let first = self.sequence + 1;
        let bytes = self.datagram(batch);
        self.socket.send(&bytes, 0).map_err(failed("send changes"))?;
        let (mut outstanding, mut result) = (batch.len(), Ok(()));
        while outstanding > 0 {
            for message in self.receive("read acknowledgements")? {
                let NetlinkPayload::Error(answer) = message.payload else { continue };
                let index = message.header.sequence_number.wrapping_sub(first) as usize;
                let Some(request) = batch.get(index) else { continue };
                outstanding -= 1;
                let Some(code) = answer.code else { continue };
                let errno = Errno::from_raw(-code.get());
                if result.is_ok() && !request.accepted.contains(&errno) {
                    result = Err(LinkError::Change { what: request.what.clone(), source: errno });
                }
            }
        }
        result
    }

    fn datagram(&mut self, batch: &[Request]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for request in batch {
            let flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
            let sequence = self.next_sequence();
            bytes.extend(serialize(request.message.clone(), flags, sequence));
        }
        bytes
    }

    /// The messages of one datagram.
    fn receive(&mut self, what: &'static str) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, LinkError> {
        let mut buffer = Vec::with_capacity(DATAGRAM);
        self.socket.recv(&mut buffer, 0).map_err(failed(what))?;
        let (mut rest, mut messages) = (buffer.as_slice(), Vec::new());
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|source| LinkError::Decode { what, source })?;
            // Messages are padded to four bytes, the last one perhaps not.
            let length = (message.header.length as usize).next_multiple_of(4).min(rest.len());
            rest = &rest[length.max(1)..];
            messages.push(message);
        }
        Ok(messages)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn serialize(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> LinkError {
    move |source| LinkError::Netlink { what, source }
}
