//! Compiles a seccomp profile in the OCI format to a BPF program, without libseccomp.
//!
//! The profile becomes rules, the rules of a call become a decision [`Node`], the calls together one search
//! over the system call number, and that tree is written out as classic BPF. What the format leaves open is
//! settled strictly: unknown fields, misspelt calls and rules that contradict each other are errors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::mem::offset_of;
use std::str::FromStr;

use libc::{seccomp_data, sock_filter, sock_fprog};
use serde::Deserialize;
use syscalls::{aarch64, x86_64};

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

/// A machine whose system calls can be filtered.
#[derive(Debug)]
struct Architecture {
    oci_name: &'static str,
    /// `AUDIT_ARCH_*` of linux/audit.h.
    audit: u32,
    /// Where the numbers of a second ABI begin, x32, which stays closed.
    numbers_end: Option<u32>,
    table: fn(&str) -> Option<u32>,
}

const X86_64: Architecture = Architecture {
    oci_name: "SCMP_ARCH_X86_64",
    audit: 0xc000_003e,
    numbers_end: Some(0x4000_0000),
    table: |name| x86_64::Sysno::from_str(name).ok().map(|call| call as u32),
};

const AARCH64: Architecture = Architecture {
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
const NATIVE: &Architecture = &X86_64;
#[cfg(target_arch = "aarch64")]
const NATIVE: &Architecture = &AARCH64;

/// Calls newer than the `syscalls` crate. Since 424 the numbers are the same everywhere.
const NEWER: [(&str, u32); 2] = [("listns", 470), ("rseq_slice_yield", 471)];

impl Architecture {
    /// The call's number; `None` for one that only other architectures have.
    fn number(&self, name: &str) -> Result<Option<u32>, ProfileError> {
        let newer = NEWER.iter().find(|(newer, _)| *newer == name).map(|(_, number)| *number);
        let here = newer.or_else(|| (self.table)(name));
        let known = here.is_some() || [X86_64, AARCH64].iter().any(|other| (other.table)(name).is_some());
        if known { Ok(here) } else { Err(ProfileError::UnknownCall(name.to_owned())) }
    }

    /// The whole program: a call made for another architecture, whose numbers mean something else, is fatal.
    fn guard(&self, search: Node) -> Node {
        let kill = Node::Return(libc::SECCOMP_RET_KILL_PROCESS);
        let cases = vec![(0, kill.clone()), (self.audit, search), (self.audit + 1, kill)];
        Node::search(Word::whole(offset_of!(seccomp_data, arch)), cases)
    }
}

/// The part of the OCI format that is understood. Docker's own `includes` and `excludes` are not in it: to
/// pass over them would widen a rule.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Profile {
    default_action: Action,
    default_errno_ret: Option<u32>,
    /// Others than the native one are left closed, as if they were not listed.
    architectures: Option<Vec<String>>,
    #[serde(default)]
    syscalls: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    names: Vec<String>,
    action: Action,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Vec<Comparison>,
    #[serde(rename = "comment")]
    _comment: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
enum Action {
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_KILL_THREAD", alias = "SCMP_ACT_KILL")]
    KillThread,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Comparison {
    index: usize,
    op: Operator,
    /// The mask, for [`Operator::MaskedEqual`].
    value: u64,
    #[serde(default)]
    value_two: u64,
}

#[derive(Clone, Copy, Deserialize)]
enum Operator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

impl Profile {
    /// The search over the system call number.
    fn search(&self, architecture: &Architecture) -> Result<Node, ProfileError> {
        if self.architectures.as_ref().is_some_and(|list| !list.iter().any(|a| a == architecture.oci_name)) {
            return Err(ProfileError::Architecture(architecture.oci_name));
        }
        let default = self.default_action.verdict(self.default_errno_ret)?;
        let mut cases = vec![(0, Node::Return(default))];
        for (number, rules) in self.rules(architecture)? {
            cases.push((number, Node::decide(&rules, default)));
            cases.push((number + 1, Node::Return(default)));
        }
        if let Some(end) = architecture.numbers_end {
            cases.push((end, Node::Return(errno_verdict(libc::ENOSYS as u32))));
        }
        // Of two cases for one number, the later is the more particular: a call right after another.
        cases.reverse();
        cases.sort_by_key(|(start, _)| *start);
        cases.dedup_by_key(|(start, _)| *start);
        Ok(Node::search(Word::whole(offset_of!(seccomp_data, nr)), cases))
    }

    /// The rules of each call that this architecture has, free of contradictions.
    fn rules(&self, architecture: &Architecture) -> Result<BTreeMap<u32, Vec<Rule>>, ProfileError> {
        let mut calls: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
        for (entry, name) in
            self.syscalls.iter().flat_map(|entry| entry.names.iter().map(move |name| (entry, name)))
        {
            let rules = entry.rules(name)?;
            let Some(number) = architecture.number(name)? else { continue };
            let earlier = calls.entry(number).or_default();
            if earlier.iter().any(|one| rules.iter().any(|other| one.contradicts(other))) {
                return Err(ProfileError::Conflict(name.clone()));
            }
            earlier.extend(rules);
        }
        Ok(calls)
    }
}

impl Entry {
    /// What the entry says about one of its calls: several rules only where it says "not equal".
    fn rules(&self, call: &str) -> Result<Vec<Rule>, ProfileError> {
        let bad = |problem| ProfileError::Condition { call: call.to_owned(), problem };
        let mut rules = vec![Rule { verdict: self.action.verdict(self.errno_ret)?, conditions: Vec::new() }];
        let mut seen = BTreeSet::new();
        for comparison in &self.args {
            if comparison.index >= ARGUMENTS {
                return Err(bad("there are six arguments, counted from 0"));
            }
            if !seen.insert(comparison.index) {
                // runc takes these for alternatives, where the rest of the format means "and".
                return Err(bad("an argument is compared twice in one entry"));
            }
            let alternatives = comparison.conditions();
            if alternatives.is_empty() {
                return Err(bad("it can never hold"));
            }
            rules = alternatives.iter().flat_map(|one| rules.iter().map(|rule| rule.and(*one))).collect();
        }
        Ok(rules)
    }
}

impl Action {
    /// The filter's return value.
    fn verdict(self, errno: Option<u32>) -> Result<u32, ProfileError> {
        match (self, errno.unwrap_or(libc::EPERM as u32)) {
            (Action::Allow, _) => Ok(libc::SECCOMP_RET_ALLOW),
            (Action::Log, _) => Ok(libc::SECCOMP_RET_LOG),
            (Action::KillProcess, _) => Ok(libc::SECCOMP_RET_KILL_PROCESS),
            (Action::KillThread, _) => Ok(libc::SECCOMP_RET_KILL_THREAD),
            (Action::Errno, number @ 0..=4095) => Ok(errno_verdict(number)),
            (Action::Errno, number) => Err(ProfileError::Errno(number)),
        }
    }
}

fn errno_verdict(errno: u32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno
}

impl Comparison {
    /// The conditions of which one must hold; none for a comparison that nothing meets.
    fn conditions(&self) -> Vec<Condition> {
        let Comparison { index, op, value, value_two } = *self;
        let below = value.checked_sub(1).map(|max| (0, max));
        let above = value.checked_add(1).map(|min| (min, u64::MAX));
        let (mask, ranges) = match op {
            Operator::NotEqual => (u64::MAX, vec![below, above]),
            Operator::Less => (u64::MAX, vec![below]),
            Operator::LessOrEqual => (u64::MAX, vec![Some((0, value))]),
            Operator::Equal => (u64::MAX, vec![Some((value, value))]),
            Operator::GreaterOrEqual => (u64::MAX, vec![Some((value, u64::MAX))]),
            Operator::Greater => (u64::MAX, vec![above]),
            Operator::MaskedEqual => {
                (value, vec![(value_two & !value == 0).then_some((value_two, value_two))])
            }
        };
        ranges.into_iter().flatten().map(|(min, max)| Condition { index, mask, min, max }).collect()
    }
}

const ARGUMENTS: usize = 6;

/// A verdict for a call whose arguments meet all the conditions.
#[derive(Clone)]
struct Rule {
    verdict: u32,
    /// At most one for each argument.
    conditions: Vec<Condition>,
}

impl Rule {
    fn and(&self, condition: Condition) -> Rule {
        let conditions = self.conditions.iter().copied().chain([condition]).collect();
        Rule { verdict: self.verdict, conditions }
    }

    /// Whether some arguments meet both rules and the verdicts differ.
    fn contradicts(&self, other: &Rule) -> bool {
        let apart = |one: &Condition| other.conditions.iter().any(|two| one.excludes(two));
        self.verdict != other.verdict && !self.conditions.iter().any(apart)
    }

    /// The rule as it stands once `argument & mask` is known to be `value`; `None` if it cannot hold then.
    fn given(&self, index: usize, mask: u64, value: u64) -> Option<Rule> {
        let (settled, open): (Vec<Condition>, Vec<Condition>) =
            self.conditions.iter().partition(|one| one.index == index && one.range_under(mask).is_some());
        let holds = settled
            .iter()
            .filter_map(|one| one.range_under(mask))
            .all(|(min, max)| min <= value && value <= max);
        holds.then_some(Rule { verdict: self.verdict, conditions: open })
    }
}

/// `min <= argument & mask <= max`; the mask is full unless `min == max`.
#[derive(Clone, Copy)]
struct Condition {
    index: usize,
    mask: u64,
    min: u64,
    max: u64,
}

impl Condition {
    /// Whether no argument meets both.
    fn excludes(&self, other: &Condition) -> bool {
        let pattern = |one: &Condition| one.min == one.max;
        if self.index != other.index {
            false
        } else if pattern(self) && pattern(other) {
            (self.min ^ other.min) & self.mask & other.mask != 0
        } else {
            // Enough, as every range that is not a single value reaches down to 0 or up to the top.
            self.highest() < other.min || other.highest() < self.min
        }
    }

    fn highest(&self) -> u64 {
        self.max | !self.mask
    }

    /// The same condition as a range of `argument & wider`, if it is one: the masks differ only in the
    /// lowest bits.
    fn range_under(&self, wider: u64) -> Option<(u64, u64)> {
        let ignored = wider ^ self.mask;
        (wider & ignored == ignored && is_low_bits(ignored)).then_some((self.min, self.max | ignored))
    }
}

fn is_low_bits(mask: u64) -> bool {
    mask & mask.wrapping_add(1) == 0
}

/// A part of `seccomp_data` that the program can load: 32 bits, masked.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Word {
    offset: u32,
    mask: u32,
}

impl Word {
    fn whole(offset: usize) -> Word {
        Word { offset: offset as u32, mask: u32::MAX }
    }

    /// The low half of an argument, of which the high half follows: both architectures are little-endian.
    fn low(index: usize, mask: u64) -> Word {
        let offset = offset_of!(seccomp_data, args) + index * size_of::<u64>();
        Word { offset: offset as u32, mask: mask as u32 }
    }

    fn high(index: usize, mask: u64) -> Word {
        let low = Word::low(index, mask >> 32);
        Word { offset: low.offset + size_of::<u32>() as u32, ..low }
    }
}

/// A decision that is still to be made, or made.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Node {
    Return(u32),
    /// The case that begins at the highest number not above the word. The first begins at 0, neighbours
    /// differ.
    Search {
        word: Word,
        cases: Vec<(u32, Node)>,
    },
}

impl Node {
    /// A search without needless cases; no search at all where the word makes no difference.
    fn search(word: Word, mut cases: Vec<(u32, Node)>) -> Node {
        cases.dedup_by(|case, before| case.1 == before.1);
        if cases.len() > 1 { Node::Search { word, cases } } else { cases.swap_remove(0).1 }
    }

    /// Decides by rules that do not contradict each other: looks at an argument, goes on with what is left.
    fn decide(rules: &[Rule], default: u32) -> Node {
        if let Some(rule) = rules.iter().find(|rule| rule.conditions.is_empty()) {
            return Node::Return(rule.verdict);
        }
        let Some(first) = rules.first().map(|rule| rule.conditions[0]) else { return Node::Return(default) };
        let conditions =
            || rules.iter().flat_map(|rule| &rule.conditions).filter(|one| one.index == first.index);
        // One search settles the whole argument if all its conditions are ranges under one mask, else as many
        // as are ranges under the first one's.
        let union = conditions().fold(0, |mask, one| mask | one.mask);
        let mask = if conditions().all(|one| one.range_under(union).is_some()) { union } else { first.mask };
        let ranges = conditions().filter_map(|one| one.range_under(mask));
        let ends = ranges.flat_map(|(min, max)| [Some(min), max.checked_add(1)]).flatten();
        let starts: BTreeSet<u64> = ends.filter(|start| *start <= mask).chain([0]).collect();
        let case = |&start: &u64| {
            let left: Vec<Rule> =
                rules.iter().filter_map(|rule| rule.given(first.index, mask, start)).collect();
            (start, Node::decide(&left, default))
        };
        Node::by_halves(first.index, mask, &starts.iter().map(case).collect::<Vec<_>>())
    }

    /// The search over a masked argument of 64 bits as one over its high half, then its low half.
    fn by_halves(index: usize, mask: u64, cases: &[(u64, Node)]) -> Node {
        // A high half of its own for every case that begins within one.
        let around = cases.iter().flat_map(|(start, _)| [start >> 32, start.div_ceil(1 << 32)]);
        let highs: BTreeSet<u64> = around.filter(|high| *high <= mask >> 32).collect();
        let low = |high: u64| {
            let base = high << 32;
            let before =
                cases.iter().rev().find(|(start, _)| *start <= base).map(|(_, node)| (0, node.clone()));
            let within = cases.iter().filter(|(start, _)| *start > base && start >> 32 == high);
            let within = within.map(|(start, node)| (*start as u32, node.clone()));
            (high as u32, Node::search(Word::low(index, mask), before.into_iter().chain(within).collect()))
        };
        Node::search(Word::high(index, mask), highs.into_iter().map(low).collect())
    }
}

/// Writes the program from its end to its beginning: a jump in BPF only goes forward, so that its target
/// already stands, and equal decisions are written once.
#[derive(Default)]
struct Assembler {
    reversed: Vec<sock_filter>,
    labels: HashMap<Node, Label>,
}

/// An instruction's place, counted from the end of the program.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Label(usize);

/// How far a jump is let go without help: 8 bits, less the two `ja` that may come in between.
const NEAR: usize = 253;

impl Assembler {
    fn assemble(tree: &Node) -> Vec<sock_filter> {
        let mut assembler = Assembler::default();
        assembler.node(tree);
        assembler.reversed.reverse();
        assembler.reversed
    }

    fn node(&mut self, node: &Node) -> Label {
        if let Some(label) = self.labels.get(node) {
            return *label;
        }
        let label = match node {
            Node::Return(verdict) => self.push(libc::BPF_RET | libc::BPF_K, *verdict, 0, 0),
            Node::Search { word, cases } => {
                self.cases(cases);
                if word.mask != u32::MAX {
                    self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, word.mask, 0, 0);
                }
                self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, word.offset, 0, 0)
            }
        };
        self.labels.insert(node.clone(), label);
        label
    }

    /// A binary search for the accumulator among the cases. With more than one, its entry is what was written
    /// last, so that a load may be put before it.
    fn cases(&mut self, cases: &[(u32, Node)]) -> Label {
        match cases {
            [(_, only)] => self.node(only),
            [(_, below), (start, single), (end, above)] if below == above && *end == start + 1 => {
                let (equal, other) = (self.node(single), self.node(below));
                self.jump(libc::BPF_JEQ, *start, equal, other)
            }
            _ => {
                let (left, right) = cases.split_at(cases.len() / 2);
                let (below, above) = (self.cases(left), self.cases(right));
                self.jump(libc::BPF_JGE, right[0].0, above, below)
            }
        }
    }

    fn jump(&mut self, test: u32, operand: u32, yes: Label, no: Label) -> Label {
        let (yes, no) = (self.reach(yes), self.reach(no));
        let (yes, no) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(libc::BPF_JMP | test | libc::BPF_K, operand, yes, no)
    }

    /// A label in reach of a conditional jump: itself, or a `ja` to it.
    fn reach(&mut self, label: Label) -> Label {
        match self.distance(label) {
            0..=NEAR => label,
            far => self.push(libc::BPF_JMP | libc::BPF_JA, far as u32, 0, 0),
        }
    }

    /// How many instructions the next one would skip to get to the label.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - label.0 - 1
    }

    fn push(&mut self, code: u32, k: u32, jt: u8, jf: u8) -> Label {
        self.reversed.push(sock_filter { code: code as u16, jt, jf, k });
        Label(self.reversed.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const PROFILE: &str = include_str!("../../../config/seccomp.json");
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const HIGH: u64 = 1 << 32;

    fn errno(number: i32) -> u32 {
        errno_verdict(number as u32)
    }

    /// What the kernel would see of a call.
    #[derive(Clone, Copy, Debug)]
    struct Call {
        audit: u32,
        number: u32,
        arguments: [u64; ARGUMENTS],
    }

    impl Call {
        /// The 32 bits at `offset` of `struct seccomp_data`, little-endian.
        fn load(&self, offset: u32) -> u32 {
            match offset {
                0 => self.number,
                4 => self.audit,
                16..64 => (self.arguments[(offset as usize - 16) / 8] >> (offset % 8 * 8)) as u32,
                _ => panic!("load at {offset}"),
            }
        }
    }

    /// Runs a program as the kernel does, but panics where the kernel's checker would have refused it.
    fn emulate(program: &Program, call: Call) -> u32 {
        let (mut accumulator, mut position) = (0_u32, 0_usize);
        loop {
            let sock_filter { code, jt, jf, k } = program.filter[position];
            let branch = |yes: bool| usize::from(if yes { jt } else { jf });
            position += 1;
            // The codes of linux/bpf_common.h, on purpose not spelt as in the assembler.
            match code {
                0x20 => accumulator = call.load(k),
                0x54 => accumulator &= k,
                0x05 => position += k as usize,
                0x15 => position += branch(accumulator == k),
                0x25 => position += branch(accumulator > k),
                0x35 => position += branch(accumulator >= k),
                0x45 => position += branch(accumulator & k != 0),
                0x06 => return k,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    fn holds(comparison: &Value, call: Call) -> bool {
        let argument = call.arguments[comparison["index"].as_u64().unwrap() as usize];
        let value = comparison["value"].as_u64().unwrap();
        match comparison["op"].as_str().unwrap() {
            "SCMP_CMP_NE" => argument != value,
            "SCMP_CMP_LT" => argument < value,
            "SCMP_CMP_LE" => argument <= value,
            "SCMP_CMP_EQ" => argument == value,
            "SCMP_CMP_GE" => argument >= value,
            "SCMP_CMP_GT" => argument > value,
            "SCMP_CMP_MASKED_EQ" => argument & value == comparison["valueTwo"].as_u64().unwrap(),
            op => panic!("{op}"),
        }
    }

    fn verdict(action: &Value, errno_ret: &Value) -> u32 {
        match action.as_str().unwrap() {
            "SCMP_ACT_ALLOW" => ALLOW,
            "SCMP_ACT_ERRNO" => errno(errno_ret.as_u64().unwrap() as i32),
            action => panic!("{action}"),
        }
    }

    /// A compiled profile together with what its JSON says, to be compared call by call.
    struct Comparer {
        architecture: &'static Architecture,
        default: u32,
        entries: BTreeMap<u32, Vec<Value>>,
        program: Program,
        cases: usize,
    }

    impl Comparer {
        fn new(architecture: &'static Architecture, json: &str) -> Comparer {
            let program = Program::compile_for(architecture, json).unwrap();
            let profile: Value = serde_json::from_str(json).unwrap();
            let mut entries: BTreeMap<u32, Vec<Value>> = BTreeMap::new();
            for entry in profile["syscalls"].as_array().unwrap() {
                let names = entry["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap());
                for number in names.filter_map(|name| architecture.number(name).unwrap()) {
                    entries.entry(number).or_default().push(entry.clone());
                }
            }
            let default = verdict(&profile["defaultAction"], &profile["defaultErrnoRet"]);
            Comparer { architecture, default, entries, program, cases: 0 }
        }

        /// The verdict straight from the JSON: that of the first entry whose comparisons all hold.
        fn expected(&self, call: Call) -> u32 {
            if call.audit != self.architecture.audit {
                return KILL;
            }
            if self.architecture.numbers_end.is_some_and(|end| call.number >= end) {
                return errno(libc::ENOSYS);
            }
            let matches = |entry: &&Value| {
                entry["args"].as_array().is_none_or(|args| args.iter().all(|one| holds(one, call)))
            };
            let entry = self.entries.get(&call.number).and_then(|entries| entries.iter().find(matches));
            entry.map_or(self.default, |entry| verdict(&entry["action"], &entry["errnoRet"]))
        }

        fn compare(&mut self, call: Call) {
            assert_eq!(emulate(&self.program, call), self.expected(call), "{call:x?}");
            self.cases += 1;
        }

        fn compare_native(&mut self, number: u32, arguments: [u64; ARGUMENTS]) {
            self.compare(Call { audit: self.architecture.audit, number, arguments });
        }

        /// Every number that can matter, with a few arguments, on this and on other architectures.
        fn compare_numbers(&mut self) {
            let edges = [4095, 0x3fff_ffff, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, u32::MAX];
            let x32 = (0..600).map(|number| 0x4000_0000 + number);
            for number in (0..600).chain(edges).chain(x32) {
                for fill in [0, 1, 2, 35, 0x5412, 0x7e02_0000, HIGH, u64::MAX] {
                    self.compare_native(number, [fill; ARGUMENTS]);
                }
                for audit in [
                    0,
                    0x4000_0003,
                    X86_64.audit ^ AARCH64.audit ^ self.architecture.audit,
                    self.architecture.audit + 1,
                ] {
                    self.compare(Call { audit, number, arguments: [0; ARGUMENTS] });
                }
            }
        }

        /// Each call with conditions, with every argument that its conditions make interesting.
        fn compare_conditions(&mut self) {
            for (number, values) in self.interesting() {
                for (index, own) in values.iter().enumerate().filter(|(_, own)| own.len() > 1) {
                    // Together with a few values of the other arguments.
                    for other in values
                        .iter()
                        .enumerate()
                        .filter(|(other, _)| *other != index)
                        .flat_map(|(_, v)| v)
                        .take(40)
                    {
                        for value in own {
                            let mut arguments = [*other; ARGUMENTS];
                            arguments[index] = *value;
                            self.compare_native(number, arguments);
                        }
                    }
                }
            }
        }

        /// For each call with conditions and each argument: the compared values and what lies around them.
        fn interesting(&self) -> BTreeMap<u32, [BTreeSet<u64>; ARGUMENTS]> {
            let mut calls: BTreeMap<u32, [BTreeSet<u64>; ARGUMENTS]> = BTreeMap::new();
            let comparisons = |entry: &Value| entry["args"].as_array().cloned().unwrap_or_default();
            for (number, entries) in &self.entries {
                for comparison in entries.iter().flat_map(comparisons) {
                    let values =
                        calls.entry(*number).or_insert_with(|| std::array::from_fn(|_| BTreeSet::from([0])));
                    let index = comparison["index"].as_u64().unwrap() as usize;
                    for key in ["value", "valueTwo"] {
                        values[index].extend(around(comparison[key].as_u64().unwrap_or(0)));
                    }
                }
            }
            calls
        }
    }

    /// A value, its neighbours, those with one bit turned, and each of them with the upper half set.
    fn around(value: u64) -> impl Iterator<Item = u64> {
        let turned = (0..64).map(move |bit| value ^ (1 << bit));
        let near = [value, value.wrapping_sub(1), value.wrapping_add(1), !value, value << 32];
        near.into_iter().chain(turned).flat_map(|value| [value, value | HIGH, value | 0xffff_ffff << 32])
    }

    fn random_numbers(mut state: u64) -> impl FnMut() -> u64 {
        // SplitMix64.
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }
    }

    #[test]
    fn program_agrees_with_the_profile() {
        for architecture in [&X86_64, &AARCH64] {
            let mut comparer = Comparer::new(architecture, PROFILE);
            comparer.compare_numbers();
            comparer.compare_conditions();
            let ioctl = architecture.number("ioctl").unwrap().unwrap();
            (0..=0xffff).for_each(|request| comparer.compare_native(ioctl, [0, request, 0, 0, 0, 0]));
            println!(
                "{}: {} cases, {} instructions",
                architecture.oci_name,
                comparer.cases,
                comparer.program.len()
            );
            assert!(comparer.cases > 20_000);
        }
    }

    #[test]
    fn any_mixture_of_conditions_agrees_with_its_profile() {
        let mut random = random_numbers(1);
        let (mut compiled, mut comparer_cases) = (0, 0);
        for _ in 0..3_000 {
            let profile = random_profile(&mut random).to_string();
            match Program::compile_for(&X86_64, &profile) {
                Ok(_) => compiled += 1,
                Err(ProfileError::Conflict(_) | ProfileError::Condition { .. }) => continue,
                Err(error) => panic!("{error}: {profile}"),
            }
            let mut comparer = Comparer::new(&X86_64, &profile);
            for _ in 0..50 {
                let arguments = std::array::from_fn(|_| random_value(&mut random));
                comparer.compare_native(random() as u32 % 4, arguments);
            }
            comparer_cases += comparer.cases;
        }
        println!("{compiled} random profiles compiled, {comparer_cases} cases");
        assert!(compiled > 500);
    }

    /// Up to four entries for the calls 0 to 2, with conditions of every kind.
    fn random_profile(random: &mut impl FnMut() -> u64) -> Value {
        let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ", "MASKED_EQ"];
        let mut entry = || {
            let name = ["read", "write", "open"][random() as usize % 3];
            let args: Vec<Value> = (0..random() % 3)
                .map(|index| {
                    let (op, value) = (operators[random() as usize % 8], random_value(random));
                    let two = random_value(random) & value;
                    json!({ "index": index, "op": format!("SCMP_CMP_{op}"), "value": value, "valueTwo": two })
                })
                .collect();
            json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": random() % 2, "args": args })
        };
        let entries: Vec<Value> = (0..4).map(|_| entry()).collect();
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entries })
    }

    /// Small numbers and edges, so that comparisons are often met.
    fn random_value(random: &mut impl FnMut() -> u64) -> u64 {
        let edges = [0, u64::MAX, HIGH, HIGH - 1, 0xffff_0000, 0x7e02_0000, 0xf0f0];
        match random() % 4 {
            0 => edges[random() as usize % edges.len()],
            1 => random() % 4 + (random() % 2) * HIGH,
            2 => 1 << (random() % 64),
            _ => random() % 8,
        }
    }

    #[test]
    fn program_is_small() {
        for architecture in [&X86_64, &AARCH64] {
            // 168 and 151 when this was written; the kernel would take 4096.
            assert!(Program::compile_for(architecture, PROFILE).unwrap().len() < 250);
        }
    }

    /// The native program's verdict on a call by name.
    fn verdict_on(name: &str, arguments: &[u64]) -> u32 {
        let program = Program::compile(PROFILE).unwrap();
        let number = NATIVE.number(name).unwrap().expect("the call exists here");
        let mut all = [0; ARGUMENTS];
        all[..arguments.len()].copy_from_slice(arguments);
        emulate(&program, Call { audit: NATIVE.audit, number, arguments: all })
    }

    #[test]
    fn known_denied_calls_get_eperm() {
        let denied = "ptrace process_vm_readv process_vm_writev pidfd_getfd process_madvise keyctl add_key request_key \
            unshare setns mount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick \
            mount_setattr pivot_root chroot io_uring_setup io_uring_enter io_uring_register bpf perf_event_open \
            userfaultfd open_by_handle_at name_to_handle_at kexec_load kexec_file_load init_module finit_module \
            delete_module reboot swapon swapoff acct quotactl quotactl_fd settimeofday clock_settime \
            clock_adjtime adjtimex sethostname setdomainname lookup_dcookie nfsservctl vhangup syslog move_pages \
            migrate_pages mbind set_mempolicy get_mempolicy set_mempolicy_home_node kcmp fanotify_init \
            fanotify_mark statmount listmount listns lsm_set_self_attr memfd_secret io_setup sync syncfs";
        for name in denied.split_whitespace() {
            assert_eq!(verdict_on(name, &[]), errno(libc::EPERM), "{name}");
        }
    }

    #[test]
    fn unknown_calls_get_enosys() {
        // clone3 by intent: only that answer makes glibc fall back to clone.
        assert_eq!(verdict_on("clone3", &[]), errno(libc::ENOSYS));
        let program = Program::compile(PROFILE).unwrap();
        for number in [472, 512, 1 << 20, 0x3fff_ffff, 0x4000_0000, u32::MAX] {
            let call = Call { audit: NATIVE.audit, number, arguments: [0; ARGUMENTS] };
            assert_eq!(emulate(&program, call), errno(libc::ENOSYS), "{number}");
        }
    }

    #[test]
    fn other_architectures_are_killed() {
        let program = Program::compile_for(&X86_64, PROFILE).unwrap();
        for audit in [0x4000_0003, AARCH64.audit, 0] {
            assert_eq!(emulate(&program, Call { audit, number: 1, arguments: [0; ARGUMENTS] }), KILL);
        }
    }

    /// Each condition's good and bad arguments; `verdict_on` takes the rest for zero.
    #[test]
    fn conditions_tell_good_arguments_from_bad() {
        const EPERM: i32 = libc::EPERM;
        const EAFNOSUPPORT: i32 = libc::EAFNOSUPPORT;
        const THREAD: u64 = 0x3d_0f00;
        let good: &[(&str, &[&[u64]])] = &[
            ("clone", &[&[THREAD], &[17], &[0x0120_0011], &[0x80], &[THREAD | HIGH]]),
            ("socket", &[&[1], &[2], &[10]]),
            ("socketpair", &[&[1]]),
            ("personality", &[&[0], &[0xffff_ffff], &[u64::MAX]]),
            ("prlimit64", &[&[0], &[0, 7]]),
            ("sched_setaffinity", &[&[0, 128]]),
            ("sched_setscheduler", &[&[0]]),
            ("sched_setparam", &[&[0]]),
            ("sched_setattr", &[&[0]]),
            ("setpriority", &[&[0, 0, 10]]),
            ("ioprio_set", &[&[1, 0, 7]]),
            (
                "ioctl",
                &[&[0, 0x5401], &[1, 0x5413], &[3, 0x5421], &[3, 0x4004_9409], &[3, 0x5411], &[3, 0x8912]],
            ),
            ("mmap", &[&[0, 4096, 3, 0x22], &[0, 4096, 3, 0x2]]),
            ("memfd_create", &[&[0, 1]]),
            (
                "setsockopt",
                &[
                    &[3, 1, 2],
                    &[3, 1, 9],
                    &[3, 1, 25],
                    &[3, 1, 27],
                    &[3, 1, 49],
                    &[3, 1, 53],
                    &[3, 6, 1],
                    &[3, 41, 26],
                ],
            ),
            ("prctl", &[&[1, 9], &[15], &[21], &[23], &[34], &[36], &[38], &[0x5356_4d41], &[0x5961_6d61]]),
        ];
        let bad: &[(&str, i32, &[&[u64]])] = &[
            (
                "socket",
                EAFNOSUPPORT,
                &[&[0], &[3], &[9], &[11], &[16], &[17], &[38], &[40], &[16 | HIGH], &[1 | HIGH]],
            ),
            ("socketpair", EAFNOSUPPORT, &[&[0], &[2], &[10], &[16]]),
            ("personality", libc::ENOSYS, &[&[8], &[0x4_0000], &[0x40_0000], &[0x4_0000 | HIGH]]),
            ("prlimit64", EPERM, &[&[1], &[2], &[HIGH], &[1 | HIGH], &[u64::MAX]]),
            ("sched_setaffinity", EPERM, &[&[1], &[HIGH]]),
            ("sched_setscheduler", EPERM, &[&[1], &[HIGH]]),
            ("sched_setparam", EPERM, &[&[1], &[HIGH]]),
            ("sched_setattr", EPERM, &[&[1], &[HIGH]]),
            ("setpriority", EPERM, &[&[0, 1], &[1, 0], &[2, 0], &[2, 1], &[0, HIGH], &[HIGH, 1]]),
            ("ioprio_set", EPERM, &[&[0, 0], &[1, 1], &[2, 0], &[3, 0], &[1, HIGH], &[1 | HIGH, 1]]),
            (
                "ioctl",
                EPERM,
                &[&[0, 0x5412], &[0, 0x541c], &[0, 0x5423], &[0, 0x5412 | HIGH], &[0, 0x541c | HIGH << 31]],
            ),
            ("mmap", EPERM, &[&[0, 4096, 3, 0x40022], &[0, 4096, 3, 0x40022 | HIGH]]),
            ("memfd_create", EPERM, &[&[0, 4], &[0, 5]]),
            (
                "setsockopt",
                EPERM,
                &[&[3, 1, 26], &[3, 1, 50], &[3, 1, 51], &[3, 1, 52], &[3, 1 | HIGH, 26], &[3, 1, 26 | HIGH]],
            ),
            ("prctl", EPERM, &[&[22], &[22 | HIGH], &[35], &[35 | HIGH], &[35 | HIGH << 31]]),
        ];
        for (name, arguments) in good.iter().flat_map(|(name, all)| all.iter().map(move |one| (name, one))) {
            assert_eq!(verdict_on(name, arguments), ALLOW, "{name} {arguments:x?}");
        }
        for (name, number, all) in bad {
            all.iter().for_each(|one| assert_eq!(verdict_on(name, one), errno(*number), "{name} {one:x?}"));
        }
    }

    #[test]
    fn clone_makes_no_namespace() {
        for bit in 0..64 {
            let namespace = [17, 25, 26, 27, 28, 29, 30].contains(&bit);
            let expected = if namespace { errno(libc::EPERM) } else { ALLOW };
            assert_eq!(verdict_on("clone", &[1 << bit]), expected, "bit {bit}");
            assert_eq!(
                verdict_on("clone", &[1 << bit | 0x3d_0f00 | HIGH]),
                expected,
                "bit {bit} among others"
            );
        }
    }

    #[test]
    fn far_jumps_reach_their_targets() {
        // Each of the calls 0 to 99 refuses three arguments with an errno of its own: no two share code.
        let names = (0..100).filter_map(x86_64::Sysno::new).map(|call| call.name());
        let entries = names.enumerate().flat_map(|(errno, name)| {
            [5, 6 * HIGH, 7].map(|value| {
                let args = json!([{ "index": value % 6, "op": "SCMP_CMP_EQ", "value": value }, { "index": 4, "op": "SCMP_CMP_GT", "value": errno }]);
                json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno + 100, "args": args })
            })
        });
        let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entries.collect::<Vec<_>>() });
        let mut comparer = Comparer::new(&X86_64, &profile.to_string());
        assert!(comparer.program.len() > 1_000, "{}", comparer.program.len());
        for number in 0..102 {
            for value in [0, 5, 6 * HIGH, 7, 150, 250] {
                comparer.compare_native(number, [value; ARGUMENTS]);
                comparer.compare_native(number, [5, 7, 0, 0, value, 5]);
            }
        }
    }

    /// Compiles a profile with one entry.
    fn compile_entry(entry: Value) -> Result<Program, ProfileError> {
        compile_entries(json!([entry]))
    }

    fn compile_entries(entries: Value) -> Result<Program, ProfileError> {
        Program::compile(&json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": entries }).to_string())
    }

    fn entry(name: &str, action: &str, args: Value) -> Value {
        json!({ "names": [name], "action": action, "args": args })
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let is_format = |result| matches!(result, Err(ProfileError::Format(_)));
        assert!(is_format(Program::compile("{")));
        assert!(is_format(Program::compile("{}")));
        assert!(is_format(compile_entry(entry("read", "SCMP_ACT_PERMIT", json!([])))));
        assert!(is_format(compile_entry(entry(
            "read",
            "SCMP_ACT_ALLOW",
            json!([{ "index": 0, "op": "==", "value": 1 }])
        ))));
        assert!(is_format(compile_entry(
            json!({ "names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {} })
        )));
        assert!(is_format(Program::compile(r#"{ "defaultAction": "SCMP_ACT_ALLOW", "flags": [] }"#)));
    }

    #[test]
    fn a_misspelt_call_is_refused() {
        let result = compile_entry(entry("pthrace", "SCMP_ACT_ERRNO", json!([])));
        assert!(matches!(result, Err(ProfileError::UnknownCall(name)) if name == "pthrace"));
    }

    #[test]
    fn a_call_of_another_architecture_is_passed_over() {
        let profile = json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry("open", "SCMP_ACT_ALLOW", json!([]))] });
        let program = Program::compile_for(&AARCH64, &profile.to_string()).unwrap();
        let nothing = json!({ "defaultAction": "SCMP_ACT_ERRNO" }).to_string();
        assert_eq!(program.len(), Program::compile_for(&AARCH64, &nothing).unwrap().len());
    }

    #[test]
    fn a_profile_for_another_architecture_is_refused() {
        let profile = r#"{ "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_S390X"] }"#;
        assert!(matches!(Program::compile(profile), Err(ProfileError::Architecture(_))));
    }

    #[test]
    fn an_errno_beyond_the_kernels_range_is_refused() {
        let result =
            compile_entry(json!({ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4096 }));
        assert!(matches!(result, Err(ProfileError::Errno(4096))));
    }

    #[test]
    fn a_condition_without_meaning_is_refused() {
        let bad = [
            json!([{ "index": 6, "op": "SCMP_CMP_EQ", "value": 1 }]),
            json!([{ "index": 0, "op": "SCMP_CMP_LT", "value": 0 }]),
            json!([{ "index": 0, "op": "SCMP_CMP_GT", "value": u64::MAX }]),
            json!([{ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 2, "valueTwo": 3 }]),
            json!([{ "index": 0, "op": "SCMP_CMP_GT", "value": 1 }, { "index": 0, "op": "SCMP_CMP_LT", "value": 5 }]),
        ];
        for args in bad {
            let result = compile_entry(entry("read", "SCMP_ACT_ALLOW", args.clone()));
            assert!(matches!(result, Err(ProfileError::Condition { .. })), "{args}");
        }
    }

    #[test]
    fn rules_that_contradict_each_other_are_refused() {
        let equal = |value: u64| json!([{ "index": 0, "op": "SCMP_CMP_EQ", "value": value }]);
        let masked = json!([{ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 0xff, "valueTwo": 35 }]);
        let second = json!([{ "index": 1, "op": "SCMP_CMP_EQ", "value": 3 }]);
        let pairs = [
            (json!([]), json!([]), true),
            (json!([]), equal(3), true),
            (equal(3), equal(3), true),
            (equal(3), equal(4), false),
            (equal(3), second, true),
            (masked.clone(), equal(35 | HIGH), true),
            (masked.clone(), equal(36), false),
            (masked.clone(), json!([{ "index": 0, "op": "SCMP_CMP_NE", "value": 35 }]), true),
            (masked.clone(), json!([{ "index": 0, "op": "SCMP_CMP_LT", "value": 35 }]), false),
            (masked, json!([{ "index": 0, "op": "SCMP_CMP_GE", "value": u64::MAX - 10 }]), false),
        ];
        for (one, two, contradict) in pairs {
            let allow = entry("read", "SCMP_ACT_ALLOW", one.clone());
            let result = compile_entries(json!([allow, entry("read", "SCMP_ACT_ERRNO", two.clone())]));
            assert_eq!(matches!(result, Err(ProfileError::Conflict(_))), contradict, "{one} {two}");
            assert!(compile_entries(json!([allow, entry("read", "SCMP_ACT_ALLOW", two)])).is_ok());
        }
    }

    #[test]
    fn a_program_beyond_the_kernels_limit_is_refused() {
        // A jump and a return for each of 2,100 outcomes.
        let entry = |value: u32| {
            let args = json!([{ "index": 0, "op": "SCMP_CMP_EQ", "value": value }]);
            json!({ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": value, "args": args })
        };
        let entries: Vec<Value> = (2..2_102).map(entry).collect();
        assert!(matches!(compile_entries(json!(entries)), Err(ProfileError::TooLong { .. })));
    }

    /// The exit code of a forked child that runs `body`, which must not allocate: the fork is of a threaded
    /// process.
    fn exit_code_of(body: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child makes system calls only and leaves by _exit, running nothing else of the test's.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let code = body();
            // SAFETY: as above.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "the child was killed: {status:#x}");
        libc::WEXITSTATUS(status)
    }

    #[test]
    fn the_kernel_enforces_the_program() {
        let program = Program::compile(PROFILE).unwrap();
        assert_eq!(
            exit_code_of(|| first_failure_under(&program)),
            0,
            "the number of the first check that failed"
        );
    }

    /// 0 when all is as it should be.
    fn first_failure_under(program: &Program) -> i32 {
        const TIOCSTI: u64 = 0x5412;
        // SAFETY: takes integers only.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 || program.install().is_err() {
            return 100;
        }
        let failed = |errno: i32, result: libc::c_long| {
            result != -1 || io::Error::last_os_error().raw_os_error() != Some(errno)
        };
        // SAFETY: every pointer is null or to a local; what would change the process is refused, or harmless.
        unsafe {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            let checks = [
                failed(libc::EAFNOSUPPORT, libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into()),
                failed(libc::EPERM, libc::unshare(libc::CLONE_NEWUSER).into()),
                failed(
                    libc::EPERM,
                    libc::prlimit(1, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit).into(),
                ),
                failed(
                    libc::EPERM,
                    libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0),
                ),
                failed(libc::ENOSYS, libc::syscall(libc::SYS_clone3, 0, 0)),
                failed(libc::EPERM, libc::syscall(libc::SYS_ioctl, 0, TIOCSTI, 0)),
                failed(libc::EPERM, libc::syscall(libc::SYS_ioctl, 0, TIOCSTI | HIGH, 0)),
                failed(libc::ENOSYS, libc::syscall(4_000)),
                libc::prlimit(0, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) != 0,
                libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) < 0,
                libc::getpid() <= 1,
                libc::write(1, [].as_ptr(), 0) != 0,
            ];
            checks.iter().position(|failed| *failed).map_or(0, |first| first as i32 + 1)
        }
    }

    #[test]
    fn without_no_new_privs_an_unprivileged_caller_is_refused() {
        let program = Program::compile(PROFILE).unwrap();
        let refused = || {
            // SAFETY: takes integers only; the raw call changes the child's one thread. Root may install anyway.
            unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            program.install().is_err_and(|error| error.raw_os_error() == Some(libc::EACCES))
        };
        assert_eq!(exit_code_of(|| i32::from(!refused())), 0);
    }
}
