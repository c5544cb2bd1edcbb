//! The first sandbox of a server is looked at from inside: here with a spec that it does not keep.

use std::collections::BTreeMap;
use std::time::Duration;

use codesandbox::runtime::embedded::{Embedded, Settings};
use codesandbox::runtime::{LayerState, Runtime, SandboxSpec};
use codesandbox::supervisor::{Caps, SOURCE, Supervisor};
use tokio::time::Instant;

use crate::support::PROGRAM;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn what_is_wider_than_it_was_asked_for_is_found_from_inside() {
    let settings =
        Settings { rootfs: None, python: None, launcher: PROGRAM.into(), instance: "probe-test".into() };
    let runtime = Embedded::start(settings, SOURCE).await.unwrap();
    let real = SandboxSpec {
        memory_bytes: 256 * MIB,
        processes: 32,
        cpus: 1.0,
        open_files: 256,
        workspace_bytes: 16 * MIB,
        tmp_bytes: 8 * MIB,
        shm_bytes: 8 * MIB,
        inodes: 1000,
    };
    let caps = Caps {
        stdout: 1024,
        stderr: 1024,
        result: 64 * 1024,
        error: 64 * 1024,
        listing_lines: 10,
        artifacts: 0,
        grace_ms: 1000,
        rlimits: BTreeMap::new(),
    };
    let found = async |asked: &SandboxSpec| {
        let sandbox = runtime.create(&real).await.unwrap();
        let layers = runtime.probe(&sandbox.id, asked).await.unwrap().layers;
        let deadline = Instant::now() + Duration::from_secs(20);
        let (mut supervisor, _) = Supervisor::attach(sandbox.stream, &caps, deadline).await.unwrap();
        let layers = supervisor.probe_layers(layers, asked).await.unwrap().into_iter();
        drop(supervisor);
        runtime.remove(&sandbox.id).await.unwrap();
        let missing = layers.filter(|layer| layer.state == LayerState::Unenforced && layer.limit.is_none());
        missing.map(|layer| (layer.name, layer.by)).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(found(&real).await, BTreeMap::new());
    for (asked, layer) in [
        (SandboxSpec { workspace_bytes: 15 * MIB, ..real.clone() }, "workspace"),
        (SandboxSpec { tmp_bytes: 7 * MIB, ..real.clone() }, "workspace"),
        (SandboxSpec { shm_bytes: 7 * MIB, ..real.clone() }, "workspace"),
        (SandboxSpec { processes: 31, ..real.clone() }, "processes"),
        (SandboxSpec { open_files: 255, ..real.clone() }, "resources"),
    ] {
        let found = found(&asked).await;
        assert!(found.contains_key(layer) && found.len() == 1, "{asked:?}: {found:?}");
    }
}
