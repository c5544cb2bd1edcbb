//! Our own share of a run: the CPU time of the server's thread, from the request's first byte to the answer's last, on
//! an engine whose sandboxes answer at once. Sockets are real, and what the kernel does for them is in it.
//!
//! `--requests N` serves N runs and ends, for callgrind: see benches/instructions.sh.

use std::net::SocketAddr;
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group};
use serde_json::{Value, json};

mod support;
use support::Client;

const SIZES: [usize; 3] = [10, 10 << 10, 1 << 20];

/// A server on a thread of its own, and that thread's clock.
struct Served {
    address: SocketAddr,
    clock: libc::clockid_t,
}

impl Served {
    /// Until the program ends.
    fn start() -> Served {
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("epoll");
            runtime.block_on(async {
                let server = support::fake_server().await;
                tell.send(server.address().expect("it listens")).expect("somebody waits");
                server.serve(std::future::pending(), Duration::ZERO).await;
            });
        });
        let mut clock = 0;
        // SAFETY: the thread runs until the program ends; `clock` is written before it is read.
        let failed = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) };
        assert_eq!(failed, 0, "a thread has a clock");
        Served { address: told.recv().expect("the server starts"), clock }
    }

    fn cpu(&self) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is ours, and the clock is that of a thread that runs.
        assert_eq!(unsafe { libc::clock_gettime(self.clock, &mut time) }, 0, "the thread runs");
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    fn client(&self, user_id: &str, fields: Value) -> Client {
        Client::new(self.address, user_id, fields)
    }
}

fn share(criterion: &mut Criterion) {
    let served = Served::start();
    let mut group = criterion.benchmark_group("dispatch");
    let mut measure = |name: BenchmarkId, mut client: Client| {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let begun = served.cpu();
                for _ in 0..count {
                    client.run();
                }
                served.cpu() - begun
            });
        });
    };
    measure(
        BenchmarkId::from_parameter("seed"),
        served.client("seed", json!({"code": "result = x + y", "data": {"x": 1, "y": 2}})),
    );
    for size in SIZES {
        let text = "x".repeat(size);
        measure(BenchmarkId::new("code", size), served.client("code", json!({"code": text})));
        // The fake gives its data back: as much out as in.
        measure(
            BenchmarkId::new("data", size),
            served.client("data", json!({"code": "1", "data": {"x": text}})),
        );
    }
}

criterion_group!(benches, share);

/// Like `criterion_main!`, with the mode for callgrind before it.
fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, flag, count] = &arguments[..]
        && flag == "--requests"
    {
        let served = Served::start();
        let mut client = served.client("seed", json!({"code": "result = x + y", "data": {"x": 1, "y": 2}}));
        for _ in 0..count.parse().expect("a number of requests") {
            client.run();
        }
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
