//! What a sandbox is to be, in words that every engine has.

use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// The limits of one sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Memory of all its processes and files together, in bytes; swap is none.
    pub memory_bytes: u64,
    /// Processes and threads alive at once, the two of the supervisor among them.
    pub processes: u64,
    /// Cores' worth of CPU time.
    pub cpus: f64,
    /// Descriptors that one process may hold.
    pub open_files: u64,
    /// Size of `/workspace`, in bytes.
    pub workspace_bytes: u64,
    /// Size of `/tmp`, in bytes.
    pub tmp_bytes: u64,
    /// Size of `/dev/shm`, in bytes.
    pub shm_bytes: u64,
    /// Files and directories in each of these three.
    pub inodes: u64,
}

impl SandboxSpec {
    /// For a sandbox of our own that does next to nothing.
    pub(super) fn smallest() -> SandboxSpec {
        SandboxSpec {
            memory_bytes: 1 << 29,
            processes: 64,
            cpus: 1.0,
            open_files: 64,
            workspace_bytes: 1 << 20,
            tmp_bytes: 1 << 20,
            shm_bytes: 1 << 20,
            inodes: 64,
        }
    }
}

/// A driver's name for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxId(pub String);

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose sandbox it is: a keyed hash of tenant and user_id in lower-case hex, never the raw id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionKey(pub String);

impl fmt::Display for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The secret of the session keys. Where sandboxes outlive the server it lies beside them, so that the next
/// one comes to the same keys.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySecret(pub [u8; 32]);

impl KeySecret {
    /// A new one.
    pub fn random() -> KeySecret {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).expect("the kernel gives random numbers once it is up");
        KeySecret(secret)
    }

    /// As `to_hex` gave it; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<KeySecret> {
        let mut secret = [0; 32];
        hex::decode_to_slice(text, &mut secret).ok().map(|()| KeySecret(secret))
    }

    /// In lower-case hex.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Debug for KeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeySecret")
    }
}

/// A sandbox that the engine knows of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The driver's name for it.
    pub id: SandboxId,
    /// Who claimed it, if anyone did.
    pub claim: Option<Claim>,
}

/// Whose a sandbox is, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The session.
    pub owner: SessionKey,
    /// The moment of the claim, to the millisecond.
    pub at: SystemTime,
}

/// What became of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Its PID 1 lives.
    Running {
        /// Processes in it that were killed for want of memory so far; `None` where nobody counts.
        out_of_memory_kills: Option<u64>,
    },
    /// Its PID 1 ended by itself.
    Exited {
        /// The exit status; 128 + the signal where a signal ended it.
        code: i32,
        /// The end of what it wrote to its stderr, for the log: at most 4 KiB.
        stderr: String,
    },
    /// Its PID 1 was killed for want of memory.
    OutOfMemory,
    /// Somebody has paused it with the engine's own means: nothing in it can answer.
    Paused,
    /// The engine does not know it.
    Gone,
}

impl Fate {
    /// The exit status of a PID 1 that SIGKILL ended.
    pub const KILLED: i32 = 128 + 9;
}

/// A protection that an engine may fail to give, by the name that `allow_unenforced` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// `limits.memory`
    Memory,
    /// `limits.processes`
    Processes,
    /// `limits.cpus`
    Cpus,
    /// A uid of its own for each sandbox, outside of it: without one, sandboxes share what the kernel counts
    /// by user, and have the rights that the server's own user has to files that they see.
    Uids,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Memory => "memory",
            Limit::Processes => "processes",
            Limit::Cpus => "cpus",
            Limit::Uids => "uids",
        })
    }
}

/// One protection, and how it stands on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Its name: `memory`, `seccomp`, `network`, …
    pub name: &'static str,
    /// Whether it holds.
    pub state: LayerState,
    /// What gives it, or what stands in for it.
    pub by: String,
    /// The limit that is not enforced where this layer is `Unenforced`.
    #[serde(skip)]
    pub limit: Option<Limit>,
    /// What the operator can do about it where it is not on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Layer {
    /// A layer that holds.
    pub fn on(name: &'static str, by: impl Into<String>) -> Layer {
        Layer { name, state: LayerState::On, by: by.into(), limit: None, remedy: None }
    }

    /// A layer that would be one more, and that no sandbox counts on.
    pub fn off(name: &'static str, by: impl Into<String>, remedy: &str) -> Layer {
        Layer { name, state: LayerState::Off, by: by.into(), limit: None, remedy: Some(remedy.into()) }
    }

    /// A layer that was asked for and is not there: no configuration may do without it.
    pub fn missing(name: &'static str, by: impl Into<String>) -> Layer {
        Layer { name, state: LayerState::Unenforced, by: by.into(), limit: None, remedy: None }
    }

    /// A layer that cannot be had here, and that a configuration may do without by the name of `limit`.
    pub fn unenforced(name: &'static str, by: impl Into<String>, limit: Limit, remedy: &str) -> Layer {
        let state = LayerState::Unenforced;
        Layer { name, state, by: by.into(), limit: Some(limit), remedy: Some(remedy.into()) }
    }
}

/// How a protection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// Enforced by the kernel or the engine.
    On,
    /// Not there, and not counted on: the others hold without it.
    Off,
    /// Not to be had here, or found not to hold; a server starts with it only by `allow_unenforced`.
    Unenforced,
}
