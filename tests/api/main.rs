//! The HTTP contract, on the real program over a real socket; what needs no Python, on the fake engine.

mod floors;
mod support;
