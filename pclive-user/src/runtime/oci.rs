//! The command line that OCI runtimes share.

use super::bundle::UNFINISHED;
use super::command::{HandedOn, describe, run};
use super::{AnswerError, Bundle, ContainerId, ContainerState, Room, RuntimeError, Status};
use nix::sys::signal::Signal;
use pclive_wire::HostPid;
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// A runtime's program with its `--root`.
#[derive(Clone, Debug)]
pub(super) struct CommandLine {
    pub program: PathBuf,
    pub root: PathBuf,
}

impl CommandLine {
    /// `state ID`.
    pub fn state(&self, id: &ContainerId) -> Result<ContainerState, RuntimeError> {
        self.must_exist(id)?;
        let arguments = self.arguments(&["state", id.as_str()]);
        let answer = run(&self.program, &arguments, None)?;
        parse_state(id, &answer)
            .map_err(|source| RuntimeError::Answer { command: describe(&self.program, &arguments), source })
    }

    /// `create`, with descriptors for the container.
    pub fn create(&self, bundle: &Bundle, handed_on: HandedOn<'_>) -> Result<(), RuntimeError> {
        let mut arguments = self.arguments(&["create", "--preserve-fds", "1", "--bundle"]);
        arguments.extend([bundle.path().into(), bundle.id().as_str().into()]);
        run(&self.program, &arguments, Some(handed_on))?;
        Ok(())
    }

    /// `start ID`.
    pub fn start(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.run(&["start", id.as_str()])
    }

    /// As [`Runtime::make_room`](super::Runtime::make_room).
    pub fn make_room(&self, bundle: &Bundle) -> Result<Room, RuntimeError> {
        match self.state(bundle.id()) {
            Ok(state) if state.unfinished && state.bundle == bundle.path() => {
                self.delete(bundle.id()).map(|()| Room::Cleared)
            }
            Ok(_) => Ok(Room::Taken),
            Err(RuntimeError::NotFound { .. }) => Ok(Room::Free),
            Err(error) => Err(error),
        }
    }

    /// `kill ID SIGNAL`.
    pub fn kill(&self, id: &ContainerId, signal: Signal) -> Result<(), RuntimeError> {
        self.must_exist(id)?;
        self.run(&["kill", id.as_str(), &(signal as i32).to_string()])
    }

    /// `delete --force ID`.
    pub fn delete(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.run(&["delete", "--force", id.as_str()])
    }

    /// Where the runtime keeps what it knows of a container.
    pub fn directory_of(&self, id: &ContainerId) -> PathBuf {
        self.root.join(id.as_str())
    }

    fn must_exist(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        match self.directory_of(id).is_dir() {
            true => Ok(()),
            false => Err(RuntimeError::NotFound { id: id.clone(), root: self.root.clone() }),
        }
    }

    fn arguments(&self, words: &[&str]) -> Vec<OsString> {
        let mut arguments = vec!["--root".into(), self.root.clone().into_os_string()];
        arguments.extend(words.iter().map(OsString::from));
        arguments
    }

    fn run(&self, words: &[&str]) -> Result<(), RuntimeError> {
        run(&self.program, &self.arguments(words), None)?;
        Ok(())
    }
}

/// Reads the answer to `state`.
fn parse_state(id: &ContainerId, answer: &[u8]) -> Result<ContainerState, AnswerError> {
    #[derive(serde::Deserialize)]
    struct Answer {
        id: String,
        status: Status,
        #[serde(default)]
        pid: i32,
        bundle: PathBuf,
        /// Not in the specification, but in the answers of runc and crun.
        rootfs: PathBuf,
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    let answer: Answer = serde_json::from_slice(answer)?;
    if answer.id != id.as_str() {
        return Err(AnswerError::OtherContainer(answer.id));
    }
    Ok(ContainerState {
        id: id.clone(),
        status: answer.status,
        init: (answer.pid > 0).then_some(HostPid(answer.pid)),
        rootfs: answer.bundle.join(answer.rootfs),
        bundle: answer.bundle,
        unfinished: answer.annotations.contains_key(UNFINISHED),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_runc_is_understood() {
        let id = ContainerId::new("n").unwrap();
        let text = r#"{ "ociVersion": "1.0.2-dev", "id": "n", "pid": 14132, "status": "running", "bundle": "/b/n",
            "rootfs": "/b/n/rootfs", "created": "2026-11-22T15:10:33.348333943Z", "owner": "" }"#;
        let state = parse_state(&id, text.as_bytes()).unwrap();
        assert_eq!((state.status, state.init), (Status::Running, Some(HostPid(14132))));
        assert_eq!((state.bundle, state.rootfs), ("/b/n".into(), "/b/n/rootfs".into()));
        assert!(!state.unfinished);
        let annotated =
            text.replace("\"owner\"", "\"annotations\": { \"io.pclive.unfinished\": \"true\" }, \"owner\"");
        assert!(parse_state(&id, annotated.as_bytes()).unwrap().unfinished);
        let stopped = text.replace("14132", "0").replace("running", "stopped");
        assert_eq!(parse_state(&id, stopped.as_bytes()).unwrap().init, None);
        for wrong in ["", "{}", &text.replace("\"n\"", "\"m\""), &text.replace("running", "flying")] {
            parse_state(&id, wrong.as_bytes()).unwrap_err();
        }
    }
}
