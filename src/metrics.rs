//! Floor 0: what is counted. A leaf, handed down: no globals, so that tests run in parallel.
//!
//! A metric's help text is its documentation.

use prometheus::{
    Counter, Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Seconds, from a tenth of a millisecond to the longest run.
const BUCKETS: [f64; 16] =
    [0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0, 60.0, 300.0];

/// Every series of the server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Runs by outcome: `ok` or the kind of the failure.
    pub runs: IntCounterVec,
    /// Seconds of a run by phase: `queue`, `claim`, `run`, `total`.
    pub run_seconds: HistogramVec,
    /// CPU seconds of the runs' own processes.
    pub run_cpu_seconds: Counter,
    /// Runs whose field was cut or refused at its cap.
    pub capped: IntCounterVec,
    /// Bytes of files by direction: `in`, `out`.
    pub file_bytes: IntCounterVec,
    /// Requests about files that are under way.
    pub file_transfers: IntGauge,
    /// HTTP requests by status.
    pub requests: IntCounterVec,
    /// Requests refused by reason.
    pub refused: IntCounterVec,
    /// Connections that are open.
    pub connections: IntGauge,
    /// Sandboxes by state: `warm`, `starting`, `claimed`, `removing`.
    pub sandboxes: IntGaugeVec,
    /// Sandboxes that may exist.
    pub capacity: IntGauge,
    /// Claims by how they were served: `hit`, `wait`, `miss`.
    pub claims: IntCounterVec,
    /// Claims that wait for a sandbox.
    pub claims_waiting: IntGauge,
    /// Seconds from asking the engine for a sandbox to its hello.
    pub create_seconds: Histogram,
    /// Calls to the engine that failed, by operation and reason: `unavailable`, `no_space`, `late`, `silent`, …
    pub engine_errors: IntCounterVec,
    /// Sessions that exist.
    pub sessions: IntGauge,
    /// Sessions ended, by reason: `idle`, `lifetime`, `deleted`, `shutdown`.
    pub sessions_ended: IntCounterVec,
    /// Sandboxes lost with their files, by reason.
    pub lost: IntCounterVec,
    /// Kernels lost with their variables, the sandbox kept.
    pub kernels_lost: IntCounter,
    /// Sandboxes of an earlier server, by what became of them: `kept`, `removed`.
    pub recovered: IntCounterVec,
    /// What differed between the engine's list and ours: `missing` there, `unknown` here.
    pub reconciled: IntCounterVec,
    /// Audit lines that did not get into their file.
    pub audit_lost: IntCounter,
    /// 1 while new runs are taken.
    pub ready: Gauge,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    /// A registry of its own with every series in it.
    pub fn new() -> Metrics {
        let registry = Registry::new();
        let make = Maker(&registry);
        let metrics = Metrics {
            runs: make.counters("runs_total", "Runs by outcome: ok, or the kind of the failure.", "outcome"),
            run_seconds: make.histograms("run_seconds", "Seconds of a run by phase.", "phase"),
            run_cpu_seconds: make.add(Counter::with_opts(Maker::options(
                "run_cpu_seconds_total",
                "CPU seconds of the runs' processes.",
            ))),
            capped: make.counters("capped_total", "Runs in which a field reached its cap.", "field"),
            file_bytes: make.counters("file_bytes_total", "Bytes of files by direction: in or out.", "direction"),
            file_transfers: make.gauge("file_transfers", "Requests about files that are under way."),
            requests: make.counters("http_requests_total", "HTTP requests by status.", "status"),
            refused: make.counters("refused_total", "Requests refused, by the code of the error.", "code"),
            connections: make.gauge("http_connections", "HTTP connections that are open."),
            sandboxes: make.gauges("sandboxes", "Sandboxes by state.", "state"),
            capacity: make.gauge("sandboxes_max", "Sandboxes that may exist."),
            claims: make.counters(
                "claims_total",
                "Claims served: by a warm sandbox (hit), one under way (wait) or one yet to be begun (miss).",
                "how",
            ),
            claims_waiting: make.gauge("claims_waiting", "Claims that wait for a sandbox."),
            create_seconds: make
                .histogram("create_seconds", "Seconds from create to the supervisor's hello."),
            engine_errors: make.add(IntCounterVec::new(
                Maker::options("engine_errors_total", "Failed calls to the engine."),
                &["operation", "reason"],
            )),
            sessions: make.gauge("sessions", "Sessions that exist."),
            sessions_ended: make.counters("sessions_ended_total", "Sessions ended, by reason.", "reason"),
            lost: make.counters(
                "sandboxes_lost_total",
                "Sandboxes lost with their files, by reason.",
                "reason",
            ),
            kernels_lost: make.add(IntCounter::with_opts(Maker::options(
                "kernels_lost_total",
                "Kernels lost with their variables, the sandbox kept.",
            ))),
            recovered: make.counters(
                "sandboxes_recovered_total",
                "Sandboxes of an earlier server, by what became of them: kept or removed.",
                "outcome",
            ),
            reconciled: make.counters(
                "reconciled_total",
                "Sandboxes that the engine had lost (missing) or that nobody knew (unknown), and that were cleared up.",
                "difference",
            ),
            audit_lost: make.add(IntCounter::with_opts(Maker::options(
                "audit_lost_total",
                "Audit lines that did not get into their file: the disk was full, broken or too slow.",
            ))),
            ready: make.float("ready", "1 while new runs are taken."),
            registry: registry.clone(),
        };
        for state in ["warm", "starting", "claimed", "removing"] {
            metrics.sandboxes.with_label_values(&[state]); // a gauge that is zero is to be seen as zero
        }
        metrics.runs.with_label_values(&["ok"]);
        metrics
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("a Vec takes every byte");
        text
    }
}

struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn add<T: prometheus::core::Collector + Clone + 'static>(&self, made: prometheus::Result<T>) -> T {
        let collector = made.expect("names and labels are constants that Prometheus accepts");
        self.0.register(Box::new(collector.clone())).expect("each name is used once");
        collector
    }

    fn options(name: &str, help: &str) -> Opts {
        Opts::new(name, help).namespace("codesandbox")
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.add(IntCounterVec::new(Maker::options(name, help), &[label]))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(Maker::options(name, help)))
    }

    fn float(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(Maker::options(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Maker::options(name, help), &[label]))
    }

    fn histogram(&self, name: &str, help: &str) -> Histogram {
        let options = HistogramOpts { common_opts: Maker::options(name, help), buckets: BUCKETS.to_vec() };
        self.add(Histogram::with_opts(options))
    }

    fn histograms(&self, name: &str, help: &str, label: &str) -> HistogramVec {
        let options = HistogramOpts { common_opts: Maker::options(name, help), buckets: BUCKETS.to_vec() };
        self.add(HistogramVec::new(options, &[label]))
    }
}

/// A gauge that counts something for as long as it exists.
#[derive(Debug)]
pub struct Counted(IntGauge);

impl Counted {
    /// One more, until it is dropped.
    pub fn new(gauge: IntGauge) -> Counted {
        gauge.inc();
        Counted(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
