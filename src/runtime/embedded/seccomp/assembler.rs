//! Classic BPF.

use std::collections::HashMap;

use libc::sock_filter;

use super::tree::Node;

/// Writes the program from its end to its beginning: a jump in BPF only goes forward, so that its target
/// already stands, and equal decisions are written once.
#[derive(Default)]
pub(super) struct Assembler {
    reversed: Vec<sock_filter>,
    labels: HashMap<Node, Label>,
}

/// An instruction's place, counted from the end of the program.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Label(usize);

/// How far a jump is let go without help: 8 bits, less the two `ja` that may come in between.
const NEAR: usize = 253;

impl Assembler {
    pub(super) fn assemble(tree: &Node) -> Vec<sock_filter> {
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
