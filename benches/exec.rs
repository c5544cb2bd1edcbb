//! A warm run over HTTP, from a client's request to its answer, on every driver that is there.
//!
//! `tests/engines.sh run cargo bench --bench exec` has Docker and Podman, too; an absent driver is told.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};

// The suite's own way to start a server of each driver.
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

use bench::Client;
use drivers_there::drivers_there;

const SIZES: [usize; 3] = [10, 10 << 10, 1 << 20];
/// Room for the largest payload.
const FLAGS: [&str; 8] = [
    "--set",
    "limits.code=2MiB",
    "--set",
    "limits.result=2MiB",
    "--set",
    "limits.stdout=2MiB",
    "--set",
    "limits.stderr=2MiB",
];

/// A run that moves so many bytes by each way, in turn.
fn payloads(size: usize) -> [(&'static str, Value); 4] {
    let text = "x".repeat(size);
    [
        ("code", json!({"code": format!("result = 3 #{text}")})),
        ("data", json!({"code": "result = len(text)", "data": {"text": text}})),
        ("result", json!({"code": format!("result = 'x' * {size}")})),
        ("stdout", json!({"code": format!("print('x' * {size})")})),
    ]
}

fn warm_runs(criterion: &mut Criterion) {
    for driver in drivers_there("exec") {
        let server = driver.own(&FLAGS);
        let address = server.address.parse().expect("the server told its address");
        let mut group = criterion.benchmark_group(format!("exec/{}", driver.name));
        let mut measure = |id: BenchmarkId, bytes: usize, fields: Value| {
            // A user for each mode: beside a kernel a fresh run costs more.
            let user = fields["mode"].as_str().unwrap_or("fresh").to_owned();
            let mut client = Client::new(address, &user, fields);
            client.run(); // the session's first run is another thing
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(id, |bencher| bencher.iter(|| client.run().len()));
        };
        for mode in ["fresh", "kernel"] {
            let fields = json!({"code": "result = x + y", "data": {"x": 1, "y": 2}, "mode": mode});
            measure(BenchmarkId::from_parameter(mode), 0, fields);
        }
        for size in SIZES {
            for (what, fields) in payloads(size) {
                measure(BenchmarkId::new(what, size), size, fields);
            }
        }
    }
}

/// Long enough for some hundred runs of the fast ones; criterion's own 5 s would take minutes for all.
fn settings() -> Criterion {
    Criterion::default().measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500))
}

criterion_group! { name = benches; config = settings(); targets = warm_runs }
criterion_main!(benches);
