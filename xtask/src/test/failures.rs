//! What failed, gathered from the test runner's output: with hundreds of tests in a dozen programs the message of the one
//! that failed stands thousands of lines above the end of a log.

use std::fmt;

/// Lines that are kept of each failure: where it was, and the message.
const KEPT: usize = 12;

/// The failures in the output of `cargo test`, which is passed line by line.
#[derive(Debug, Default)]
pub struct Failures {
    found: Vec<Failure>,
    /// The lines belong to the last one.
    inside: bool,
}

#[derive(Debug)]
struct Failure {
    test: String,
    lines: Vec<String>,
}

impl Failures {
    /// Looks at the next line.
    pub fn line(&mut self, line: &str) {
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.found.push(Failure { test: test.into(), lines: Vec::new() });
            self.inside = true;
        } else if ["failures:", "stack backtrace:"].contains(&line) || line.starts_with("test result: ") {
            self.inside = false;
        } else if let Some(failure) = self.found.last_mut().filter(|_| self.inside) {
            failure.take(line);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }
}

impl Failure {
    /// Keeps the first lines from the panic on; before it stands what the test has printed, which may be long.
    fn take(&mut self, line: &str) {
        let begins = line.starts_with("thread '") && line.contains(" panicked at ");
        if (begins || !self.lines.is_empty()) && self.lines.len() < KEPT && !line.is_empty() {
            self.lines.push(line.into());
        }
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Failure { test, lines } in &self.found {
            writeln!(f, "failed: {test}")?;
            for line in lines {
                writeln!(f, "    {line}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_of_each_failure_is_kept() {
        let output = "test a::b ... FAILED\n\nfailures:\n\n---- a::b stdout ----\nsaid before\n\n\
                      thread 'a::b' (12) panicked at src/a.rs:3:5:\nleft: 1\nstack backtrace:\n   0: f\n\n---- c stdout ----\n\
                      thread 'c' panicked at src/c.rs:1:1:\nno\n\nfailures:\n    a::b\n    c\n\n\
                      test result: FAILED. 7 passed; 2 failed\n\n---- d stdout ----\nended without a panic\n";
        let mut failures = Failures::default();
        assert!(failures.is_empty());
        output.lines().for_each(|line| failures.line(line));
        assert_eq!(
            failures.to_string(),
            "failed: a::b\n    thread 'a::b' (12) panicked at src/a.rs:3:5:\n    left: 1\n\
             failed: c\n    thread 'c' panicked at src/c.rs:1:1:\n    no\nfailed: d\n"
        );
    }

    #[test]
    fn a_long_message_is_cut() {
        let mut failures = Failures::default();
        failures.line("---- a stdout ----");
        failures.line("thread 'a' panicked at a.rs:1:1:");
        (0..100).for_each(|line| failures.line(&line.to_string()));
        assert_eq!(failures.to_string().lines().count(), 1 + KEPT);
    }
}
