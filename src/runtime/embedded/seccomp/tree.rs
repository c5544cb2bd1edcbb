//! The decisions that a filter makes, as a tree: what the rules of a call come to, in the fewest looks.

use std::collections::BTreeSet;
use std::mem::offset_of;

use libc::seccomp_data;

pub(super) const ARGUMENTS: usize = 6;

/// A verdict for a call whose arguments meet all the conditions.
#[derive(Clone)]
pub(super) struct Rule {
    pub(super) verdict: u32,
    /// At most one for each argument.
    pub(super) conditions: Vec<Condition>,
}

impl Rule {
    pub(super) fn and(&self, condition: Condition) -> Rule {
        let conditions = self.conditions.iter().copied().chain([condition]).collect();
        Rule { verdict: self.verdict, conditions }
    }

    /// Whether some arguments meet both rules and the verdicts differ.
    pub(super) fn contradicts(&self, other: &Rule) -> bool {
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
pub(super) struct Condition {
    pub(super) index: usize,
    pub(super) mask: u64,
    pub(super) min: u64,
    pub(super) max: u64,
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

pub(super) fn is_low_bits(mask: u64) -> bool {
    mask & mask.wrapping_add(1) == 0
}

/// A part of `seccomp_data` that the program can load: 32 bits, masked.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Word {
    pub(super) offset: u32,
    pub(super) mask: u32,
}

impl Word {
    pub(super) fn whole(offset: usize) -> Word {
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
pub(super) enum Node {
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
    pub(super) fn search(word: Word, mut cases: Vec<(u32, Node)>) -> Node {
        cases.dedup_by(|case, before| case.1 == before.1);
        if cases.len() > 1 { Node::Search { word, cases } } else { cases.swap_remove(0).1 }
    }

    /// Decides by rules that do not contradict each other: looks at an argument, goes on with what is left.
    pub(super) fn decide(rules: &[Rule], default: u32) -> Node {
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
