//! The frames between server and supervisor: what it costs to write one and to read one, by the size of its payload.

use bytes::BytesMut;
use codesandbox::supervisor::protocol::{Request, decode, encode, sections};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SIZES: [usize; 3] = [10, 10 << 10, 1 << 20];
const LONGEST: usize = 16 << 20;

fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frames/encode");
    for size in SIZES {
        let code = vec![b'x'; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            let mut buffer = Vec::new();
            bencher.iter(|| {
                buffer.clear();
                encode(&mut buffer, 7, Request::Run, &[b"{\"timeout_ms\":10000}", &code, b"{}", b""]);
                buffer.len()
            });
        });
    }
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frames/decode");
    for size in SIZES {
        let mut frame = Vec::new();
        encode(&mut frame, 7, Request::Run, &[&[0; 36], b"3", &vec![b'x'; size], b"", b"[\"total 0\"]", b""]);
        frame[8] = 130; // an answer: what the server decodes
        let frame = BytesMut::from(&frame[..]);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            let decoded = |mut frame: BytesMut| {
                let frame = decode(&mut frame, LONGEST).expect("it is a frame").expect("and a whole one");
                sections::<6>(frame.payload).expect("of six sections")
            };
            bencher.iter_batched(|| frame.clone(), decoded, BatchSize::SmallInput);
        });
    }
}

criterion_group!(benches, write, read);
criterion_main!(benches);
