//! What a sandbox is, looked at from inside: its ids, namespaces, mounts, limits, network, and that one user's
//! sandbox is nothing to another's. What only the embedded driver makes itself is in `tests/api`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::drivers::Driver;
use crate::support::Server;

behaviours! {
    "isolation":
    a_run_is_an_ordinary_user_without_rights,
    a_run_has_no_group_but_its_own,
    pid_1_has_the_same_layers_as_a_run,
    every_namespace_is_its_own,
    the_environment_is_the_fixed_one_and_nothing_of_the_servers,
    mounts_are_read_only_or_small_and_never_set_uid,
    file_systems_have_the_sizes_and_inodes_of_the_configuration,
    resource_limits_are_those_of_the_configuration,
    dev_holds_six_devices_and_nothing_else,
    the_kernels_doors_in_proc_are_masked,
    only_its_own_processes_are_there,
    the_network_is_lo_alone,
    one_users_files_and_sockets_are_nothing_to_another,
    a_deleted_users_files_are_gone_for_whoever_comes_next,
    a_process_of_one_user_is_out_of_reach_of_another,
    many_sandboxes_at_once_are_as_many,
    cpu_time_is_limited,
}

/// The result of code; the run has to go well.
fn result(server: &Server, user: &str, code: &str) -> Value {
    let answer = server.run(user, code);
    assert!(answer.get("error").is_none(), "{answer}");
    answer["result"].clone()
}

/// A user id as a run has it: never root's, and where we make the user namespace ourselves always the same.
fn own_id(driver: &Driver, id: &Value) -> u64 {
    let id = id.as_u64().unwrap();
    assert!(if driver.is_embedded() { id == 1000 } else { id >= 1000 }, "{id}");
    id
}

// -- who a run is ------------------------------------------------------------------------------------

fn a_run_is_an_ordinary_user_without_rights(driver: &Driver) {
    let code = "import os\nstatus = dict(l.split(':\\t', 1) for l in open('/proc/self/status').read().splitlines() if ':\\t' in l)\nresult = [os.getresuid(), os.getresgid(), {k: status[k].strip() for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb', 'NoNewPrivs', 'Seccomp')}]";
    let (server, u) = driver.server(&[]);
    let found = result(&server, &u, code);
    let id = own_id(driver, &found[0][0]);
    assert_eq!((&found[0], &found[1]), (&json!([id, id, id]), &json!([id, id, id])));
    let none = "0000000000000000";
    let expected = json!({"CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none,
        "NoNewPrivs": "1", "Seccomp": "2"});
    assert_eq!(found[2], expected);
}

fn a_run_has_no_group_but_its_own(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let found = result(&server, &u, "import os\nresult = [os.getgroups(), os.getgid()]");
    // Who has one id only cannot give groups up; the tests' ordinary user comes with none.
    let (groups, own) = (&found[0], json!([own_id(driver, &found[1])]));
    assert!(*groups == json!([]) || *groups == own, "{groups}");
}

fn pid_1_has_the_same_layers_as_a_run(driver: &Driver) {
    let code = "status = dict(l.split(':\\t', 1) for l in open('/proc/1/status').read().splitlines() if ':\\t' in l)\nresult = [status[k].split() for k in ('Uid', 'Gid', 'CapBnd', 'CapEff', 'NoNewPrivs', 'Seccomp')]";
    let (server, u) = driver.server(&[]);
    let id = result(&server, &u, "import os\nresult = os.getuid()");
    let (id, none) = (vec![own_id(driver, &id).to_string(); 4], ["0000000000000000"]);
    assert_eq!(result(&server, &u, code), json!([id, id, none, none, ["1"], ["2"]]));
}

fn every_namespace_is_its_own(driver: &Driver) {
    let code = "import os\nresult = {n: os.readlink('/proc/self/ns/' + n) for n in ('user', 'pid', 'mnt', 'net', 'ipc', 'uts', 'cgroup')}";
    let (server, u) = driver.server(&[]);
    let (one, other) = (result(&server, &u, code), result(&server, "other", code));
    for (name, inside) in one.as_object().unwrap() {
        // Docker's is the host's, unless the daemon maps uids; rootless Podman's is one for all containers of its user.
        if name == "user" && !driver.is_embedded() {
            continue;
        }
        let host = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(inside.as_str().unwrap(), host.to_str().unwrap(), "{name} is the host's");
        assert_ne!(inside, &other[name], "two users share {name}");
    }
}

// -- what a run sees ---------------------------------------------------------------------------------

fn the_environment_is_the_fixed_one_and_nothing_of_the_servers(driver: &Driver) {
    let code = "import os\nresult = dict(os.environ)";
    let (server, u) = driver.server(&["--set", "limits.cpus=1.5"]);
    let found = result(&server, &u, code);
    let mut expected = json!({"HOME": "/workspace", "HOSTNAME": "sandbox", "LANG": "C.UTF-8", "LOGNAME": "sandbox",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": "/tmp",
        "USER": "sandbox", "MPLCONFIGDIR": "/tmp", "MALLOC_ARENA_MAX": "2"});
    for name in ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"] {
        expected[name] = json!("2");
    }
    if driver.engine().is_some_and(|_| !driver.is_docker()) {
        // Podman's own, in every container.
        expected["container"] = json!("podman");
        expected["TERM"] = json!("xterm");
    }
    assert_eq!(found, expected);
}

fn mounts_are_read_only_or_small_and_never_set_uid(driver: &Driver) {
    let code = "import os\nresult = [[p, t, o.split(','), os.path.isdir(p)] \
        for _, p, t, o, *_ in map(str.split, open('/proc/self/mounts'))]";
    let (server, u) = driver.server(&[]);
    let mut writable = BTreeSet::from(["/workspace", "/tmp", "/dev/shm", "/dev/pts", "/proc"]);
    if !driver.is_embedded() {
        // Root's: see hostile::writing_where_nobody_may.
        writable.extend(["/dev", "/dev/mqueue", "/sys/fs/cgroup", "/run/.containerenv"]);
    }
    let mounts = result(&server, &u, code);
    assert!(mounts.as_array().unwrap().len() > 8, "{mounts}");
    for mount in mounts.as_array().unwrap() {
        let (path, options) = (mount[0].as_str().unwrap(), mount[2].as_array().unwrap());
        let has = |option: &str| options.contains(&json!(option));
        if !driver.is_embedded() && (path == "/" || path.starts_with("/etc/")) {
            // The image's own, and single files of the engine's: no_new_privileges and the lack of CAP_MKNOD stand in for nosuid and nodev.
            assert!(has("ro") || path != "/", "{mount}");
            continue;
        }
        let a_device = !driver.is_embedded() && path.starts_with("/dev/") && mount[1] == "devtmpfs";
        // Over what is masked: an empty, read-only directory, or the null device.
        let a_mask = (path.starts_with("/proc/") || path.starts_with("/sys/"))
            && (mount[1] == "tmpfs" || mount[1] == "devtmpfs")
            && (has("ro") || mount[3] == false);
        assert!(has("nosuid") || a_device || a_mask, "{mount}");
        let device = path.starts_with("/dev") && path != "/dev/shm";
        assert!(has("nodev") || device || a_mask, "devices work in {mount}");
        assert!(has("ro") || writable.contains(path) || a_device || a_mask, "{mount} can be written");
    }
    let names: Vec<&str> = mounts.as_array().unwrap().iter().map(|m| m[0].as_str().unwrap()).collect();
    assert!(!names.iter().any(|name| name.starts_with("/sys") && driver.is_embedded()), "{names:?}");
}

fn file_systems_have_the_sizes_and_inodes_of_the_configuration(driver: &Driver) {
    let flags = [
        "--set",
        "limits.workspace=48MiB",
        "--set",
        "limits.tmp=24MiB",
        "--set",
        "limits.shm=12MiB",
        "--set",
        "limits.inodes=2000",
    ];
    let code = "import os\nresult = [[s.f_blocks * s.f_frsize >> 20, s.f_files] for s in map(os.statvfs, ('/workspace', '/tmp', '/dev/shm'))]";
    let (server, u) = driver.server(&flags);
    let mut found = result(&server, &u, code);
    if !driver.limits_inodes() {
        for file_system in found.as_array_mut().unwrap() {
            file_system[1] = json!(2000);
        }
    }
    assert_eq!(found, json!([[48, 2000], [24, 2000], [12, 2000]]));
}

fn resource_limits_are_those_of_the_configuration(driver: &Driver) {
    let flags =
        ["--set", "limits.processes=40", "--set", "limits.open_files=200", "--set", "limits.memory=400MiB"];
    let code = "import resource as r\nresult = [list(r.getrlimit(x)) for x in (r.RLIMIT_CORE, r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_MEMLOCK, r.RLIMIT_MSGQUEUE, r.RLIMIT_AS)]";
    let (server, u) = driver.server(&flags);
    let found = result(&server, &u, code);
    let address_space = if driver.limits_memory() { -1 } else { 400 << 20 };
    let expected =
        json!([[0, 0], [40, 40], [200, 200], [65536, 65536], [0, 0], [address_space, address_space]]);
    assert_eq!(found, expected);
}

fn dev_holds_six_devices_and_nothing_else(driver: &Driver) {
    let code = "import os, stat\nresult = [sorted(os.listdir('/dev')), sorted(n for n in os.listdir('/dev') if stat.S_ISBLK(os.stat('/dev/' + n).st_mode))]";
    let mut names = vec![
        "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom",
        "zero",
    ];
    if !driver.is_embedded() {
        names.insert(2, "mqueue"); // which every container has; no message fits into it: see RLIMIT_MSGQUEUE
    }
    let (server, u) = driver.server(&[]);
    assert_eq!(result(&server, &u, code), json!([names, []]));
    let works = "import os\nopen('/dev/null', 'w').write('x')\nresult = [open('/dev/zero', 'rb').read(2).hex(), len(open('/dev/urandom', 'rb').read(9)), len(os.urandom(5))]";
    assert_eq!(result(&server, &u, works), json!(["0000", 9, 5]));
}

fn the_kernels_doors_in_proc_are_masked(driver: &Driver) {
    let code = r#"
import os
result = []
for name in ("kcore", "keys", "timer_list", "sched_debug", "latency_stats", "interrupts", "acpi", "scsi", "driver", "asound"):
    path = "/proc/" + name
    try:
        shown = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(10)
    except OSError: continue
    if shown: result.append(path)
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/user/max_user_namespaces", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity",
             "/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/shmmax", "/proc/sys/kernel/hostname"):
    try: open(path, "r+b").write(b"1")
    except OSError: continue
    result.append(path + " is writable")
"#;
    let namespaces = r#"
import os
result = [n for n in os.listdir("/proc/sys/user") if n.endswith("_namespaces") and open("/proc/sys/user/" + n).read() != "0\n"]
"#;
    let (server, u) = driver.server(&[]);
    assert_eq!(result(&server, &u, code), json!([]));
    if driver.is_embedded() {
        // In a container the seccomp profile alone refuses them: see hostile::namespaces.
        assert_eq!(result(&server, &u, namespaces), json!([]));
    }
}

fn only_its_own_processes_are_there(driver: &Driver) {
    let code = "import os\nours = (os.getpid(), os.getppid())\nresult = sorted(int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) not in ours)";
    let (server, u) = driver.server(&[]);
    let _other = result(&server, "other", "result = 1");
    let others = result(&server, &u, code);
    assert!([json!([]), json!([1])].contains(&others), "{others}");
}

fn the_network_is_lo_alone(driver: &Driver) {
    let code = r#"
import errno, os, socket
def refused(address):
    try: socket.create_connection(address, 2).close()
    except OSError as error: return errno.errorcode.get(error.errno, "no name")
    return "works"
server = socket.create_server(("127.0.0.1", 0))
own = refused(server.getsockname())
names = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
routes = open("/proc/net/route").read().splitlines()[1:]
result = [names, routes, own, [refused(a) for a in (("192.0.2.1", 80), ("169.254.169.254", 80), ("10.0.0.1", 22), ("example.com", 80))],
    refused(("127.0.0.1", port)), refused(("::1", port)).replace("EADDRNOTAVAIL", "ECONNREFUSED"), socket.gethostname(), socket.gethostbyname("localhost")]
"#;
    let (server, u) = driver.server(&[]);
    let port: u16 = server.address.rsplit(':').next().unwrap().parse().unwrap();
    let answer = server.run_with(&u, code, json!({"data": {"port": port}}));
    let unreachable = "ENETUNREACH";
    let expected = json!([
        ["lo"],
        [],
        "works",
        [unreachable, unreachable, unreachable, "no name"],
        "ECONNREFUSED",
        "ECONNREFUSED",
        "sandbox",
        "127.0.0.1"
    ]);
    assert_eq!(answer["result"], expected, "{answer}");
}

// -- one user and another ----------------------------------------------------------------------------

fn one_users_files_and_sockets_are_nothing_to_another(driver: &Driver) {
    let plant = r#"
import os, socket
for place in ("/workspace", "/tmp", "/dev/shm"):
    with open(place + "/canary-7f3a", "w") as file: file.write("canary-7f3a")
sock = socket.socket(socket.AF_UNIX); sock.bind("\0canary-7f3a")
import ctypes
ctypes.CDLL(None).shmget(0x7f3a, 4096, 0o1666)
"#;
    let look = r#"
import ctypes, os
result = []
for place in ("/workspace", "/tmp", "/dev/shm", "/run", "/dev", "/opt"):
    for directory, _, files in os.walk(place):
        result += [directory + "/" + name for name in files if "canary" in name]
for path in ("/proc/net/unix", "/proc/sysvipc/shm", "/proc/self/mountinfo"):
    result += [path] * ("canary" in open(path).read())
result += ["shm"] * (ctypes.CDLL(None).shmget(0x7f3a, 4096, 0o666) >= 0)
"#;
    let (server, u) = driver.server(&[]);
    server.run(&u, plant);
    for user in ["other", &u.to_uppercase(), &format!("{u} ")] {
        assert_eq!(result(&server, user, look), json!([]), "{user}");
    }
}

fn a_deleted_users_files_are_gone_for_whoever_comes_next(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "open('canary', 'w').write('x'); open('/tmp/canary', 'w')");
    server.request("DELETE", &format!("/sessions/{u}"), &[], "");
    for user in [&u, &format!("{u}-next"), &format!("{u}-and-next")] {
        let found = result(&server, user, "import os\nresult = os.listdir() + os.listdir('/tmp')");
        assert_eq!(found, json!([]), "{user}");
    }
}

fn a_process_of_one_user_is_out_of_reach_of_another(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    std::thread::scope(|scope| {
        let spin = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(0.8)\nresult = 'untouched'";
        let victim = scope.spawn(|| result(&server, "victim", spin));
        let kill = "import os\nfor pid in range(2, 3000):\n if pid != os.getpid():\n  try: os.kill(pid, 9)\n  except OSError: pass\ntry: os.kill(-1, 9)\nexcept OSError: pass\nresult = 1";
        for _ in 0..3 {
            server.run("killer", kill); // it may well kill itself: its own affair
        }
        assert_eq!(victim.join().unwrap(), "untouched");
    });
}

fn many_sandboxes_at_once_are_as_many(driver: &Driver) {
    // A daemon takes a tenth of a second of both cores for each.
    let many = if driver.is_embedded() { 60 } else { 12 };
    let server = driver.own(&[]);
    let found: Vec<Value> = std::thread::scope(|scope| {
        let run = |n: usize| {
            let server = &server;
            scope.spawn(move || {
                let code = format!("import os, time\nopen('mine', 'w').write('{n}')\ntime.sleep(0.5)\nresult = [os.readlink('/proc/self/ns/pid'), open('mine').read(), os.listdir()]");
                result(server, &format!("user-{n}"), &code)
            })
        };
        let all: Vec<_> = (0..many).map(run).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    for (n, one) in found.iter().enumerate() {
        assert_eq!((&one[1], &one[2]), (&json!(n.to_string()), &json!(["mine"])), "{one}");
    }
    let namespaces: BTreeSet<&str> = found.iter().map(|one| one[0].as_str().unwrap()).collect();
    assert_eq!(namespaces.len(), many);
    assert_eq!(server.metric(r#"codesandbox_sandboxes{state="claimed"}"#), many as f64);
}

fn cpu_time_is_limited(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.cpus=0.25"]);
    let code =
        "import time\nend = time.time() + 1\nwhile time.time() < end: pass\nresult = time.process_time()";
    let used = result(&server, &u, code).as_f64().unwrap();
    assert!(used < 0.6 || !driver.limits_cpus(), "{used} s of CPU in one second");
}
