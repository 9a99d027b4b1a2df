//! The port on which a workload is asked how it is: a line in, a line out, over TCP.
//!
//! An answer is `ok` and some numbers, or `differs` and the differences, separated by `"; "`. A connection takes any
//! number of questions, so a client may keep one open over a move.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::Duration;

/// The longest question that is listened to.
const LONGEST_QUESTION: usize = 256;

/// What a workload says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Everything is as it must be; the words are counters, see the workload.
    Ok(String),
    /// What is not as it must be.
    Differs(Vec<String>),
}

impl Answer {
    /// `ok` if nothing differs.
    pub fn new(differences: Vec<String>, counters: impl FnOnce() -> String) -> Self {
        if differences.is_empty() { Answer::Ok(counters()) } else { Answer::Differs(differences) }
    }

    /// The line that goes over the wire, without its end.
    pub fn to_line(&self) -> String {
        match self {
            Answer::Ok(counters) => format!("ok {counters}"),
            Answer::Differs(list) => {
                format!(
                    "differs {}",
                    list.iter().map(|d| d.replace(['\n', ';'], " ")).collect::<Vec<_>>().join("; ")
                )
            }
        }
    }

    /// The opposite of [`Self::to_line`].
    ///
    /// # Errors
    /// A line that starts with neither word.
    pub fn parse(line: &str) -> std::io::Result<Self> {
        if let Some(counters) = line.strip_prefix("ok ") {
            return Ok(Answer::Ok(counters.to_owned()));
        }
        match line.strip_prefix("differs ") {
            Some(list) => Ok(Answer::Differs(list.split("; ").map(str::to_owned).collect())),
            None => Err(std::io::Error::new(ErrorKind::InvalidData, format!("strange answer {line:?}"))),
        }
    }
}

/// A client's connection to a workload.
#[derive(Debug)]
pub struct Client(BufReader<TcpStream>);

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Those of `connect(2)` and of looking up the name.
    pub fn connect(address: impl ToSocketAddrs) -> std::io::Result<Self> {
        Ok(Client(BufReader::new(TcpStream::connect(address)?)))
    }

    /// Asks one question and waits for the answer, `patience` at most.
    ///
    /// # Errors
    /// A connection that broke or stays silent, or an answer that is none.
    pub fn ask(&mut self, question: &str, patience: Duration) -> std::io::Result<Answer> {
        self.0.get_ref().set_read_timeout(Some(patience))?;
        self.0.get_mut().write_all(format!("{question}\n").as_bytes())?;
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Answer::parse(line.trim_end())
    }
}

/// Opens the port and says so on standard output: `listening on ADDRESS`.
///
/// # Errors
/// Those of `bind(2)`.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    println!("listening on {}", listener.local_addr()?);
    Ok(listener)
}

/// Answers questions for ever, on one thread.
///
/// # Errors
/// Only if the listener itself breaks; a client that goes away is forgotten.
pub fn serve(listener: &TcpListener, mut answer: impl FnMut(&str) -> Answer) -> std::io::Result<()> {
    let mut clients: Vec<Connection> = Vec::new();
    loop {
        let ready = wait_readable(listener, &clients)?;
        if ready[0] {
            clients.push(Connection { stream: listener.accept()?.0, pending: Vec::new() });
        }
        let mut ready = ready[1..].iter();
        // A connection accepted just now has no entry in `ready` and is looked at next time.
        clients.retain_mut(|client| match ready.next() {
            Some(true) => client.converse(&mut answer).is_ok(),
            _ => true,
        });
    }
}

/// Which of the listener and the clients, in this order, have something to read.
fn wait_readable(listener: &TcpListener, clients: &[Connection]) -> std::io::Result<Vec<bool>> {
    let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    fds.extend(clients.iter().map(|client| PollFd::new(client.stream.as_fd(), PollFlags::POLLIN)));
    while poll(&mut fds, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
    Ok(fds.iter().map(|fd| fd.any().unwrap_or(false)).collect())
}

struct Connection {
    stream: TcpStream,
    /// The beginning of a question.
    pending: Vec<u8>,
}

impl Connection {
    /// Reads what is there and answers every whole line; an error ends the connection.
    fn converse(&mut self, answer: &mut impl FnMut(&str) -> Answer) -> std::io::Result<()> {
        let mut buffer = [0; LONGEST_QUESTION];
        let length = self.stream.read(&mut buffer)?;
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.pending.extend_from_slice(&buffer[..length]);
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let reply = answer(String::from_utf8_lossy(&line).trim()).to_line();
            self.stream.write_all(format!("{reply}\n").as_bytes())?;
        }
        if self.pending.len() > LONGEST_QUESTION { Err(ErrorKind::InvalidData.into()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_the_wire() {
        for answer in [Answer::Ok("1 2".into()), Answer::Differs(vec!["a: b".into(), "c".into()])] {
            assert_eq!(Answer::parse(&answer.to_line()).unwrap(), answer);
        }
        assert_eq!(Answer::Differs(vec!["a; b".into()]).to_line(), "differs a  b");
        assert!(Answer::parse("oh").is_err());
    }

    #[test]
    fn one_connection_takes_many_questions_beside_others() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener, |question| Answer::Ok(question.to_uppercase())));
        let (mut one, mut two) = (Client::connect(address).unwrap(), Client::connect(address).unwrap());
        for question in ["check", "instance"] {
            for client in [&mut one, &mut two] {
                let answer = client.ask(question, Duration::from_secs(5)).unwrap();
                assert_eq!(answer, Answer::Ok(question.to_uppercase()));
            }
        }
    }
}
