//! What a driver is held to, by name.

use std::sync::Arc;

use crate::drivers::Driver;

/// One behaviour; it panics where the driver does not have it.
#[derive(Clone)]
pub(crate) struct Behaviour {
    /// As the trials are named after it: `PART::NAME`.
    pub(crate) name: String,
    pub(crate) holds: Arc<dyn Fn(&Driver) + Send + Sync>,
}

impl Behaviour {
    pub(crate) fn new(name: String, holds: impl Fn(&Driver) + Send + Sync + 'static) -> Behaviour {
        Behaviour { name, holds: Arc::new(holds) }
    }
}

/// The behaviours of a part, each a function of its name. One that is forgotten here is told by the compiler.
macro_rules! behaviours {
    ($part:literal: $($name:ident),* $(,)?) => {
        pub(crate) fn behaviours() -> Vec<$crate::behaviour::Behaviour> {
            let all: &[(&str, fn(&$crate::drivers::Driver))] = &[$((stringify!($name), $name)),*];
            let behaviour = |(name, holds): &(&str, fn(&$crate::drivers::Driver))| {
                $crate::behaviour::Behaviour::new(format!("{}::{name}", $part), *holds)
            };
            all.iter().map(behaviour).collect()
        }
    };
}
