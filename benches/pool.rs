//! The pool alone, on an engine that answers at once: what a claim costs where many come at the same time.

use std::time::{Duration, Instant};

use codesandbox::runtime::SessionKey;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use tokio::runtime::Runtime;

mod support;

const CLAIMANTS: [u64; 3] = [1, 8, 64];
const SIZE: usize = 16;
const CAPACITY: usize = 128;

/// From asking for a sandbox to having one, and giving it back: so many times, by so many at once.
async fn claims(claimants: u64, each: u64) -> Duration {
    let pool = support::pool(SIZE, CAPACITY);
    while pool.warm() < SIZE {
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    let tasks: Vec<_> = (0..claimants)
        .map(|one| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for number in 0..each {
                    let owner = SessionKey(format!("{one:08x}{number:08x}"));
                    drop(pool.claim(&owner).await.expect("there is room for all"));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a claim does not panic");
    }
    begun.elapsed()
}

fn contention(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("threads");
    let mut group = criterion.benchmark_group("pool/claim");
    for claimants in CLAIMANTS {
        group.bench_function(BenchmarkId::new("claimants", claimants), |bencher| {
            bencher.iter_custom(|count| {
                let each = count.div_ceil(claimants);
                let spent = runtime.block_on(claims(claimants, each));
                spent.mul_f64(count as f64 / (each * claimants) as f64)
            });
        });
    }
}

criterion_group!(benches, contention);
criterion_main!(benches);
