//! Compiles a seccomp profile in the OCI format to a BPF program, without libseccomp.
//!
//! The entries of the [`profile`] become rules, the rules of a call a decision, the calls together one search over the
//! system call number; and that [`tree`] is written out as classic BPF by the [`assembler`]. What the format leaves open is
//! settled strictly: unknown fields, misspelt calls and rules that contradict each other are errors.

mod architecture;
mod assembler;
mod profile;
#[cfg(test)]
mod tests;
mod tree;

use std::io;

use libc::{sock_filter, sock_fprog};

use architecture::{Architecture, NATIVE};
use assembler::Assembler;
use profile::Profile;

/// A compiled profile for the architecture that this program runs on.
#[derive(Debug)]
pub(crate) struct Program {
    filter: Vec<sock_filter>,
}

impl Program {
    /// Compiles `profile_json`, a `linux.seccomp` object of the OCI runtime specification.
    pub(crate) fn compile(profile_json: &str) -> Result<Program, ProfileError> {
        Program::compile_for(NATIVE, profile_json)
    }

    fn compile_for(architecture: &Architecture, profile_json: &str) -> Result<Program, ProfileError> {
        let profile: Profile = serde_json::from_str(profile_json).map_err(ProfileError::Format)?;
        let tree = architecture.guard(profile.search(architecture)?);
        let filter = Assembler::assemble(&tree);
        if filter.len() > libc::BPF_MAXINSNS as usize {
            return Err(ProfileError::TooLong { instructions: filter.len() });
        }
        Ok(Program { filter })
    }

    /// The number of instructions.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.filter.len()
    }

    /// Installs the filter for the calling thread, for good; needs `no_new_privs` to be set.
    ///
    /// Makes one system call and allocates nothing: safe between fork and exec.
    pub(crate) fn install(&self) -> io::Result<()> {
        // The cast cannot cut: `compile` keeps to BPF_MAXINSNS, 4096. The kernel only reads the filter.
        let program = sock_fprog { len: self.filter.len() as u16, filter: self.filter.as_ptr().cast_mut() };
        // SAFETY: seccomp(2) copies the program during the call, and `program` points to `len` instructions
        // that `self` keeps alive.
        let status =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Why a profile was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    /// Not JSON, or a field, action or operator that is not known here.
    #[error("seccomp profile is not in the known part of the OCI format")]
    Format(#[source] serde_json::Error),
    /// The profile's architectures leave out the one that this program runs on.
    #[error("seccomp profile is not for {0}")]
    Architecture(&'static str),
    /// A name in no system call table: passed over, a misspelt rule would weaken the profile in silence.
    #[error("seccomp profile names the unknown system call {0:?}")]
    UnknownCall(String),
    /// An error number that the kernel would cut down.
    #[error("seccomp profile asks for the errno {0}, above the highest, 4095")]
    Errno(u32),
    /// A condition that says nothing clear.
    #[error("seccomp profile has a bad condition for {call}: {problem}")]
    Condition { call: String, problem: &'static str },
    /// Two rules with different actions that match the same call.
    #[error("seccomp profile contradicts itself about {0}")]
    Conflict(String),
    /// More instructions than the kernel takes.
    #[error("seccomp profile needs {instructions} instructions, more than the kernel takes")]
    TooLong { instructions: usize },
}
