//! How long a thread runs before another one's turn comes: the shorter, the sooner after it is woken.

use libc::sched_attr;

/// The least that Linux takes.
const SHORTEST_NS: u64 = 100_000;

/// For a thread that passes on what others wait for, on cores where an engine works for milliseconds. What it forks is
/// as ever. Nothing is done where Linux has no such slices (before 6.12), nor where somebody has chosen another policy,
/// or a priority above the usual one, which a fork would lose.
pub(super) fn shorten() {
    let usual = |now: &sched_attr| now.sched_policy == libc::SCHED_OTHER as u32 && now.sched_nice >= 0;
    let Some(now) = of(0).filter(|now| usual(now) && now.sched_runtime != 0) else { return };
    let sched_flags = now.sched_flags | libc::SCHED_FLAG_RESET_ON_FORK as u64;
    let shorter = sched_attr { sched_runtime: SHORTEST_NS, sched_flags, ..now };
    // SAFETY: the kernel reads as much as the first field says, which is the whole. Where it refuses, all is as before.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const shorter, 0) };
}

/// Of a process or thread, 0 being the calling one.
fn of(pid: u32) -> Option<sched_attr> {
    // SAFETY: all of its fields are integers.
    let mut found: sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes no more than it is told to.
    let told =
        unsafe { libc::syscall(libc::SYS_sched_getattr, pid, &raw mut found, size_of::<sched_attr>(), 0) };
    (told == 0).then_some(found)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_thread_has_it_shorter_and_what_it_starts_does_not() {
        let usual = of(0).unwrap();
        let tried = std::thread::spawn(|| {
            shorten();
            let mut child = Command::new("sleep").arg("60").spawn().unwrap();
            let childs = of(child.id()).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            (of(0).unwrap(), childs)
        });
        let (own, childs) = tried.join().unwrap();
        let told = |one: sched_attr| (one.sched_policy, one.sched_nice, one.sched_flags, one.sched_runtime);
        assert_eq!(told(childs), told(usual));
        let can = usual.sched_runtime != 0 && usual.sched_nice >= 0; // what this Linux and whoever started us allow
        let (flags, runtime) = if can { (1, SHORTEST_NS) } else { (usual.sched_flags, usual.sched_runtime) };
        assert_eq!(told(own), (usual.sched_policy, usual.sched_nice, flags, runtime));
    }
}
