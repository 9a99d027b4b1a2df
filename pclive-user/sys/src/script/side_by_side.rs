//! Scripts that several threads of one process run at the same time.

use super::borrowed::{Arena, Borrowed};
use super::{Outcome, Script};
use crate::ptrace::Tracee;
use crate::{Error, Result};
use pclive_wire::manifest::Registers;
use std::borrow::Borrow;
use std::iter::zip;

/// Runs a script in the leader of a process and one in each of several of its other threads, all of them stopped: as many at
/// a time as the arena has room for. The other threads are given back, whether or not that succeeds. Returns what each left
/// behind, the leader first.
///
/// If scripts fail, the first error in that order is returned; the scripts that ran beside the one that failed have come
/// to their ends nonetheless.
pub fn run_all<S: Borrow<Script>>(
    arena: &Arena,
    (leader, script): (&Borrowed<'_>, &Script),
    members: &[(&Tracee, S)],
) -> Result<Vec<Outcome>> {
    let mut registers: Vec<_> = members.iter().map(|(tracee, _)| leader.registers_of(tracee)).collect();
    if let Some(returning) = registers.iter().position(|read| matches!(read, Err(Error::Returning(_)))) {
        return Err(registers.swap_remove(returning).expect_err("just seen"));
    }
    let members: Vec<Member<'_, S>> =
        zip(members, registers).map(|((tracee, script), registers)| (*tracee, registers, script)).collect();
    let mut outcomes = Vec::with_capacity(1 + members.len());
    let mut first = Some(script);
    let mut ahead = members;
    while first.is_some() || !ahead.is_empty() {
        let mut room = arena.room();
        if let Some(script) = first {
            room.place(script)?;
        }
        let fits = |(_, _, script): &&Member<'_, S>| room.place((*script).borrow()).is_ok();
        let fitting = ahead.iter().take(leader.members()).take_while(fits).count();
        // At least one thread: if there is no room for it, it says so.
        let later = ahead.split_off(fitting.max(usize::from(first.is_none())));
        let group = std::mem::replace(&mut ahead, later);
        outcomes.extend(run_together(arena, (leader, first.take()), group)?);
    }
    Ok(outcomes)
}

/// Another thread than the leader, the registers that it has, and its script.
type Member<'a, S> = (&'a Tracee, Result<Registers>, &'a S);

/// Lets all threads go before it waits for any, and waits for all that it could let go.
///
/// The last comes first, the leader last. If the process is killed, the leader is not gone for `waitpid(2)` before all
/// other threads have been waited for (`delay_group_leader` in kernel/exit.c): it must not run unless they do.
fn run_together<S: Borrow<Script>>(
    arena: &Arena,
    (leader, script): (&Borrowed<'_>, Option<&Script>),
    members: Vec<Member<'_, S>>,
) -> Result<Vec<Outcome>> {
    let mut room = arena.room();
    let start = members.into_iter().enumerate().rev().map(|(index, (tracee, registers, script))| {
        let place = room.place(script.borrow())?;
        let borrowed = leader.beside((tracee, registers?), (arena, place, index))?;
        let running = borrowed.start(arena, place, script.borrow());
        Ok((borrowed, running))
    });
    let started: Vec<Result<_>> = start.collect();
    let leading = script.map(|script| leader.start(arena, room.place(script)?, script));
    let finish = |started: Result<(Borrowed<'_>, Result<_>)>| {
        let (borrowed, running) = started?;
        let done = running.and_then(|running| borrowed.finish(running));
        borrowed.give_back_after(done)
    };
    let mut done: Vec<Result<Outcome>> = started.into_iter().map(finish).collect();
    done.extend(leading.map(|running| leader.finish(running?)));
    done.reverse();
    done.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::super::sleeper::Team;
    use super::super::{Arg, Expect};
    use super::*;
    use nix::errno::Errno;

    fn name_of(tracee: &Tracee) -> String {
        std::fs::read_to_string(format!("/proc/{}/comm", tracee.tid())).unwrap().trim_end().to_owned()
    }

    fn set_name(script: &mut Script, name: &str) {
        let name = script.string(name.as_bytes());
        script.call("PR_SET_NAME", libc::SYS_prctl, [libc::PR_SET_NAME.into(), name.into()]);
    }

    #[test]
    fn each_thread_has_its_own_data_results_and_links() {
        let team = Team::start(20);
        let mut script = Script::new();
        let pair = script.room(8);
        let name = script.room(16);
        let gettid = script.call("gettid", libc::SYS_gettid, []);
        script.call("pipe2", libc::SYS_pipe2, [pair.into(), 0.into()]);
        let duplicate = script.call("dup", libc::SYS_dup, [Arg::Word(pair, 0)]);
        for fd in [Arg::Word(pair, 0), Arg::Word(pair, 4), duplicate.into()] {
            script.call("close", libc::SYS_close, [fd]);
        }
        let scripts: Vec<Script> = (0..20)
            .map(|i| {
                let mut script = script.clone();
                set_name(&mut script, &format!("thread {i}"));
                script.call("PR_GET_NAME", libc::SYS_prctl, [libc::PR_GET_NAME.into(), name.into()]);
                script
            })
            .collect();
        let outcomes = team.run_all(&scripts).unwrap();
        team.check_untouched();
        for (i, (tracee, outcome)) in zip(&team.tracees, &outcomes).enumerate() {
            assert_eq!(outcome.result(gettid), i64::from(tracee.tid().0));
            assert!(outcome.data(name).starts_with(format!("thread {i}\0").as_bytes()));
            assert_eq!(name_of(tracee), format!("thread {i}"));
        }
    }

    #[test]
    fn all_run_at_the_same_time() {
        let team = Team::start(3);
        let mut script = Script::new();
        let pair = script.room(8);
        script.call("pipe2", libc::SYS_pipe2, [pair.into(), 0.into()]);
        let outcome = team.run_all(&[script]).unwrap().remove(0);
        let end = |i: usize| i32::from_ne_bytes(outcome.data(pair)[i * 4..][..4].try_into().unwrap());
        // Each of the outer ones ends only because the one between them does what it must.
        let mut scripts = [Script::new(), Script::new(), Script::new()];
        for (script, call) in zip(&mut scripts, [libc::SYS_read, libc::SYS_write, libc::SYS_read]) {
            let fd = end(usize::from(call == libc::SYS_write));
            let len = if call == libc::SYS_write { 2 } else { 1 };
            let text = script.data(b"xy");
            script.call_expecting(
                "transfer",
                call,
                [fd.into(), text.into(), len.into()],
                Expect::Exactly(len),
            );
        }
        team.run_all(&scripts).unwrap();
        team.check_untouched();
    }

    #[test]
    fn the_call_that_fails_is_named_and_the_other_threads_come_to_their_ends() {
        let team = Team::start(5);
        let mut scripts = vec![Script::new(); 5];
        for (i, script) in scripts.iter_mut().enumerate() {
            if i == 2 || i == 3 {
                script.call(format!("close of nothing by {i}"), libc::SYS_close, [99.into()]);
            }
            set_name(script, "done");
        }
        let error = team.run_all(&scripts).unwrap_err();
        team.check_untouched();
        assert_eq!(error.errno(), Some(Errno::EBADF));
        assert!(
            error.to_string().starts_with(&format!("close of nothing by 2 in {}", team.tracees[2].tid()))
        );
        let done: Vec<bool> = team.tracees.iter().map(|tracee| name_of(tracee) == "done").collect();
        assert_eq!(done, [true, true, false, false, true]);
    }

    #[test]
    fn more_threads_than_the_arena_has_room_for_take_turns() {
        let team = Team::start(7);
        let mut script = Script::new();
        script.room(20_000);
        let gettid = script.call("gettid", libc::SYS_gettid, []);
        let outcomes = team.run_all(&vec![script.clone(); 7]).unwrap();
        let tids = |tid: &Outcome| tid.result(gettid) as i32;
        let expected: Vec<i32> = team.tracees.iter().map(|tracee| tracee.tid().0).collect();
        assert_eq!(outcomes.iter().map(tids).collect::<Vec<_>>(), expected);

        let mut too_large = script.clone();
        too_large.room(50_000);
        let error = team.run_all(&[script.clone(), too_large, script]).unwrap_err();
        assert!(matches!(error, Error::ScriptTooLarge { .. }), "{error}");
        team.check_untouched();
    }

    #[test]
    fn a_thread_that_is_gone_does_not_keep_the_others() {
        let mut team = Team::start(3);
        let mut exit = Script::new();
        exit.call("exit", libc::SYS_exit, [0.into()]);
        let error = team.run_all(&[Script::new(), exit]).unwrap_err();
        assert!(matches!(error, Error::Gone(tid) if tid == team.tracees[1].tid()), "{error}");

        let mut script = Script::new();
        set_name(&mut script, "done");
        let error = team.run_all(&vec![script; 3]).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ESRCH));
        team.forget(1);
        team.check_untouched();
        assert!(team.tracees.iter().all(|tracee| name_of(tracee) == "done"));
    }

    #[test]
    fn a_process_that_is_killed_meanwhile_is_gone() {
        for killer in 0..3 {
            let team = Team::start(3);
            let pid = team.tracees[0].tid();
            let mut scripts = vec![Script::new(); 3];
            for (i, script) in scripts.iter_mut().enumerate() {
                if i == killer {
                    script.call("kill", libc::SYS_kill, [pid.0.into(), libc::SIGKILL.into()]);
                }
                script.call("pause", libc::SYS_pause, []);
            }
            let error = team.run_all(&scripts).unwrap_err();
            // Otherwise it may be killed before the leader can be let go.
            if killer == 0 {
                assert!(matches!(error, Error::Gone(tid) if tid == pid), "{error}");
            }
        }
    }
}
