//! A sandbox's life on every driver that is there, without a server: made and heard of, claimed, removed.
//!
//! `tests/engines.sh run cargo bench --bench lifecycle` has Docker and Podman, too; an absent driver is told.

use std::time::{Duration, Instant};

use codesandbox::runtime::{SandboxId, SessionKey, SharedRuntime};
use codesandbox::supervisor::{SOURCE, Supervisor};
use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use tokio::runtime::Runtime;

// The suite's own way to start each driver.
#[allow(dead_code)]
#[path = "../tests/conformance/drivers.rs"]
mod drivers;
#[allow(dead_code)]
#[path = "../tests/conformance/engine.rs"]
mod engine;
#[allow(dead_code)]
#[path = "../tests/api/support.rs"]
mod support;

#[path = "support/mod.rs"]
mod bench;
#[path = "support/drivers_there.rs"]
mod drivers_there;

use drivers_there::drivers_there;

const PATIENCE: Duration = Duration::from_secs(30);

/// One whole life, and what each part of it took.
#[derive(Debug, Default)]
struct Life {
    create: Duration,
    claim: Duration,
    remove: Duration,
}

async fn create(engine: &SharedRuntime) -> (SandboxId, Supervisor) {
    let sandbox = engine.create(&bench::spec()).await.expect("the engine makes a sandbox");
    let hello =
        Supervisor::attach(sandbox.stream, &bench::caps(), tokio::time::Instant::now() + PATIENCE).await;
    (sandbox.id, hello.expect("its supervisor says hello").0)
}

async fn live(engine: &SharedRuntime) -> Life {
    let begun = Instant::now();
    let (id, supervisor) = create(engine).await;
    let created = Instant::now();
    let claiming = engine.claim(&id, &SessionKey("beef".into())).await.expect("the engine takes the claim");
    claiming.await.expect("and carries it out");
    let claimed = Instant::now();
    engine.remove(&id).await.expect("the engine removes it");
    drop(supervisor);
    Life { create: created - begun, claim: claimed - created, remove: claimed.elapsed() }
}

fn lives(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("threads");
    for driver in drivers_there("lifecycle") {
        let engine = runtime.block_on(driver.runtime(&drivers::new_instance(), SOURCE));
        let mut group = criterion.benchmark_group(format!("lifecycle/{}", driver.name));
        group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
        type Part = fn(&Life) -> Duration;
        let parts: [(&str, Part); 3] =
            [("create", |life| life.create), ("claim", |life| life.claim), ("remove", |life| life.remove)];
        for (part, of) in parts {
            group.bench_function(part, |bencher| {
                bencher.iter_custom(|count| (0..count).map(|_| of(&runtime.block_on(live(&engine)))).sum());
            });
        }
    }
}

criterion_group!(benches, lives);
criterion_main!(benches);
