//! The machines that a profile is compiled for, by their system call numbers.

use std::mem::offset_of;
use std::str::FromStr;

use libc::seccomp_data;
use syscalls::{aarch64, x86_64};

use super::ProfileError;
use super::tree::{Node, Word};

/// A machine whose system calls can be filtered.
#[derive(Debug)]
pub(super) struct Architecture {
    pub(super) oci_name: &'static str,
    /// `AUDIT_ARCH_*` of linux/audit.h.
    pub(super) audit: u32,
    /// Where the numbers of a second ABI begin, x32, which stays closed.
    pub(super) numbers_end: Option<u32>,
    table: fn(&str) -> Option<u32>,
}

pub(super) const X86_64: Architecture = Architecture {
    oci_name: "SCMP_ARCH_X86_64",
    audit: 0xc000_003e,
    numbers_end: Some(0x4000_0000),
    table: |name| x86_64::Sysno::from_str(name).ok().map(|call| call as u32),
};

pub(super) const AARCH64: Architecture = Architecture {
    oci_name: "SCMP_ARCH_AARCH64",
    audit: 0xc000_00b7,
    numbers_end: None,
    table: |name| match name {
        // What libseccomp and the kernel's own table call it; the crate says fstatat.
        "newfstatat" => Some(79),
        _ => aarch64::Sysno::from_str(name).ok().map(|call| call as u32),
    },
};

#[cfg(target_arch = "x86_64")]
pub(super) const NATIVE: &Architecture = &X86_64;
#[cfg(target_arch = "aarch64")]
pub(super) const NATIVE: &Architecture = &AARCH64;

/// Calls newer than the `syscalls` crate. Since 424 the numbers are the same everywhere.
pub(super) const NEWER: [(&str, u32); 2] = [("listns", 470), ("rseq_slice_yield", 471)];

impl Architecture {
    /// The call's number; `None` for one that only other architectures have.
    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, ProfileError> {
        let newer = NEWER.iter().find(|(newer, _)| *newer == name).map(|(_, number)| *number);
        let here = newer.or_else(|| (self.table)(name));
        let known = here.is_some() || [X86_64, AARCH64].iter().any(|other| (other.table)(name).is_some());
        if known { Ok(here) } else { Err(ProfileError::UnknownCall(name.to_owned())) }
    }

    /// The whole program: a call made for another architecture, whose numbers mean something else, is fatal.
    pub(super) fn guard(&self, search: Node) -> Node {
        let kill = Node::Return(libc::SECCOMP_RET_KILL_PROCESS);
        let cases = vec![(0, kill.clone()), (self.audit, search), (self.audit + 1, kill)];
        Node::search(Word::whole(offset_of!(seccomp_data, arch)), cases)
    }
}
