//! A profile in the OCI format, as it is written.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;

use libc::seccomp_data;
use serde::Deserialize;

use super::ProfileError;
use super::architecture::Architecture;
use super::tree::{ARGUMENTS, Condition, Node, Rule, Word};

/// The part of the OCI format that is understood. Docker's own `includes` and `excludes` are not in it: to
/// pass over them would widen a rule.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Profile {
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
    pub(super) fn search(&self, architecture: &Architecture) -> Result<Node, ProfileError> {
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

pub(super) fn errno_verdict(errno: u32) -> u32 {
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
