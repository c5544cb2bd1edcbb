//! What a sandbox is, looked at from inside and from the host: its ids, namespaces, mounts, limits, network, and
//! that one user's sandbox is nothing to another's, nor to a server that was killed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::{Server, as_ordinary_user, command_line, eventually, is_root};

/// The servers that a layer has to hold on: as whoever runs the tests, and as an ordinary user.
fn servers(flags: &[&str]) -> [(&'static str, Server); 2] {
    [("as we are", Server::start(flags)), ("as an ordinary user", Server::start_as_ordinary_user(flags))]
}

/// The result of code; the run has to go well.
fn result(server: &Server, user: &str, code: &str) -> Value {
    let answer = server.run(user, code);
    assert!(answer.get("error").is_none(), "{answer}");
    answer["result"].clone()
}

// -- who a run is ------------------------------------------------------------------------------------

#[test]
fn outside_each_sandbox_of_root_is_another_unprivileged_user() {
    if !is_root() {
        return eprintln!("skipped: an ordinary user has one id");
    }
    let server = Server::start(&[]);
    let code = "result = [int(open('/proc/self/' + m).read().split()[1]) for m in ('uid_map', 'gid_map')]";
    let ids: Vec<Value> = ["one", "two"].iter().map(|user| result(&server, user, code)).collect();
    assert_ne!(ids[0], ids[1]);
    for id in ids.iter().flat_map(|pair| pair.as_array().unwrap()) {
        assert!(id.as_u64().unwrap() >= 2_000_000_000, "{id}");
    }
    let pid = processes_below(server.pid());
    let owners: BTreeSet<u32> = pid.iter().map(|pid| owner(*pid)).filter(|uid| *uid != 0).collect();
    assert!(owners.len() >= 2, "as the host sees it: {owners:?}");
}

// -- what a run sees ---------------------------------------------------------------------------------

#[test]
fn nothing_of_the_hosts_own_files_is_there() {
    let secret = tempfile::Builder::new().prefix("host-secret-").tempdir_in("/var/tmp").unwrap();
    let code = "import os\nexists = [p for p in ('/var/log', '/var/lib', '/var/tmp', '/home', '/srv', '/boot', '/mnt', '/media', '/sys/kernel', '/etc/shadow', '/etc/ssh', '/etc/hostname', '/run/docker.sock', '/run/systemd', '/root/.ssh', '/root/.bashrc', '/root/.cargo', '/work', secret) if os.path.exists(p)]\nresult = [exists, sorted(os.listdir('/')), open('/etc/passwd').read(), open('/etc/resolv.conf').read()]";
    for (who, server) in servers(&[]) {
        let answer = server.run_with("u", code, json!({"data": {"secret": secret.path()}}));
        let found = &answer["result"];
        assert_eq!(found[0], json!([]), "{who}: {answer}");
        let root: BTreeSet<&str> = found[1].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        let known = BTreeSet::from([
            "bin",
            "dev",
            "etc",
            "lib",
            "lib32",
            "lib64",
            "libx32",
            "opt",
            "proc",
            "root",
            "run",
            "sbin",
            "tmp",
            "usr",
            "workspace",
        ]); // root: where the interpreter's own prefix is below it
        assert!(root.is_subset(&known), "{who}: {root:?}");
        let passwd = found[2].as_str().unwrap();
        let names: Vec<_> = passwd.lines().filter_map(|line| line.split(':').next()).collect();
        assert_eq!(names, ["root", "sandbox", "nobody"], "{who}: {passwd}");
        assert_eq!(found[3], "", "{who}");
    }
}

#[test]
fn below_the_interpreters_prefix_nothing_else_of_a_home_is_there() {
    let code = "import os, sys\nprefix = os.path.realpath(sys.base_prefix)\nresult = []\nfor path in ('/root', '/home'):\n for directory, names, files in os.walk(path):\n  names[:] = [n for n in names if (directory + '/' + n) != prefix]\n  if not prefix.startswith(directory) or files: result.append([directory, names, files])";
    for (who, server) in servers(&[]) {
        assert_eq!(result(&server, "u", code), json!([]), "{who}");
    }
}

// -- one user and another ----------------------------------------------------------------------------

// -- from the host's side ----------------------------------------------------------------------------

/// Of every process its parent, then all that come from `root`, itself not.
fn processes_below(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let (mut found, mut at) = (vec![root], 0);
    while at < found.len() {
        let of = found[at];
        found.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
        at += 1;
    }
    found.split_off(1)
}

fn owner(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The directories of control groups whose path holds `part`.
fn groups(part: &str) -> Vec<PathBuf> {
    fn walk(directory: &Path, part: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.path().to_string_lossy().contains(part) {
                    found.push(entry.path());
                }
                walk(&entry.path(), part, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), part, &mut found);
    found
}

fn first(directories: &[PathBuf], files: [&str; 2]) -> Option<String> {
    let read = |directory: &PathBuf| {
        files.iter().find_map(|name| std::fs::read_to_string(directory.join(name)).ok())
    };
    directories.iter().find_map(read).map(|text| text.trim().to_owned())
}

#[test]
fn the_control_groups_limits_are_really_there() {
    if !is_root() {
        return eprintln!("skipped: an ordinary user has no control group");
    }
    let flags = ["--set", "limits.memory=400MiB", "--set", "limits.processes=41", "--set", "limits.cpus=0.5"];
    let server = Server::start(&flags);
    // Known by its name in the supervisor's process: the only python below the server whose namespace is the run's.
    let pid_namespace = result(&server, "u", "import os\nresult = os.readlink('/proc/self/ns/pid')");
    let is_it = |pid: &u32| {
        let namespace = std::fs::read_link(format!("/proc/{pid}/ns/pid"));
        namespace.is_ok_and(|namespace| namespace.to_str() == pid_namespace.as_str())
    };
    // A run is answered before its process has ended, which is in no group at its very end.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let processes: Vec<u32> = processes_below(server.pid()).into_iter().filter(is_it).collect();
    assert!(!processes.is_empty());
    for pid in processes {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let own: Vec<&str> = text
            .lines()
            .filter_map(|line| line.rsplit(':').next())
            .filter(|path| path.contains("sandbox-"))
            .collect();
        assert!(!own.is_empty(), "process {pid} is in no group of ours: {text}");
        let mut directories: Vec<PathBuf> = own.iter().flat_map(|path| groups(path)).collect();
        directories.retain(|path| own.iter().any(|own| path.to_string_lossy().ends_with(own)));
        let memory = first(&directories, ["memory.limit_in_bytes", "memory.max"]);
        assert_eq!(memory.as_deref(), Some("419430400"), "{directories:?}");
        assert_eq!(first(&directories, ["pids.max", "pids.max"]).as_deref(), Some("41"), "{directories:?}");
        let quota = first(&directories, ["cpu.cfs_quota_us", "cpu.max"]).unwrap();
        assert!(["50000", "50000 100000"].contains(&&*quota), "{quota}");
    }
}

#[test]
fn a_removed_session_leaves_no_process_and_no_group() {
    let server = Server::start(&["--instance", "isolation-removed", "--set", "pool.size=0"]);
    for n in 0..5 {
        result(
            &server,
            &format!("u{n}"),
            "import subprocess\nsubprocess.Popen(['sleep', '1000'])\nresult = 1",
        );
    }
    let of_sandbox = |path: &&PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("sandbox-");
    let ours = || groups("codesandbox-isolation-removed-").iter().filter(of_sandbox).count();
    assert!(!is_root() || ours() >= 5, "{:?}", groups("codesandbox-isolation-removed-"));
    for n in 0..5 {
        let (status, _, _) = server.request("DELETE", &format!("/sessions/u{n}"), &[], "");
        assert_eq!(status, 204);
    }
    eventually("only the launchers are left", || processes_below(server.pid()).len() <= 2);
    eventually("no group of a sandbox is left", || ours() == 0);
}

#[test]
fn a_server_that_stops_leaves_no_group() {
    let server = Server::start(&["--instance", "isolation-stopped"]);
    result(&server, "u", "result = 1");
    drop(server);
    eventually("no group is left", || groups("codesandbox-isolation-stopped-").is_empty());
}

#[test]
fn a_killed_server_leaves_no_process_and_the_next_start_no_group() {
    for ordinary in [false, true] {
        let flags = ["--instance", "isolation-killed"];
        let start = || if ordinary { Server::start_as_ordinary_user(&flags) } else { Server::start(&flags) };
        let mut server = start();
        let code = "import os, subprocess\nif os.fork() == 0:\n os.setsid()\n while True: pass\nresult = 1";
        let stay = json!({"timeout_ms": 20_000});
        result(&server, "idle", code);
        std::thread::scope(|scope| {
            // A run that goes on while the server dies; its client sees the connection end.
            let address = server.address.clone();
            scope.spawn(move || {
                use std::io::{Read, Write};
                let code = "import os, time\nfor n in range(5):\n if os.fork() == 0: os.setsid(); break\ntime.sleep(1000)";
                let mut body = json!({"user_id": "busy", "code": code});
                body["timeout_ms"] = stay["timeout_ms"].clone();
                let body = body.to_string();
                let mut stream = std::net::TcpStream::connect(address).unwrap();
                let head = format!("POST /run HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all((head + &body).as_bytes()).unwrap();
                let _ = stream.read(&mut [0; 100]); // ends with the server
            });
            std::thread::sleep(std::time::Duration::from_millis(400));
            let processes = processes_below(server.pid());
            assert!(processes.len() >= 4, "{processes:?}");
            server.signal(libc::SIGKILL);
            server.wait();
            eventually("every process of a killed server is gone", || {
                !processes.iter().any(|pid| is_alive(*pid))
            });
        });
        let dead = format!("codesandbox-isolation-killed-{}", server.pid());
        let next = start();
        assert_eq!(groups(&dead), Vec::<PathBuf>::new(), "the next start cleans up");
        assert_eq!(result(&next, "idle", "import os\nresult = os.listdir()"), json!([]));
    }
}

/// Not gone, and not a zombie whose reaper has not come by yet.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

// -- the start ---------------------------------------------------------------------------------------

/// What the program says when an ordinary user starts it so.
fn refusal(flags: &[&str]) -> (Option<i32>, String) {
    let (mut command, _directory) = as_ordinary_user();
    command.args(["--listen", "127.0.0.1:0"]).args(flags).stdin(Stdio::null()).stdout(Stdio::null());
    let output = command.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_start_refuses_what_this_host_cannot_enforce_and_says_what_helps() {
    if !is_root() {
        return eprintln!("skipped: this user may have a control group of its own");
    }
    let (status, said) = refusal(&[]);
    assert_eq!(status, Some(2), "{said}");
    for part in ["memory", "cpus", "what helps", "--allow-unenforced", "systemd-run"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let (status, said) = refusal(&["--allow-unenforced", "cpus"]);
    assert_eq!(status, Some(2), "one of two is not enough: {said}");
    assert!(said.contains("memory"), "{said}");
}

#[test]
fn what_is_not_enforced_is_told_for_as_long_as_it_lasts() {
    if !is_root() {
        return eprintln!("skipped: this user may have a control group of its own");
    }
    let server = Server::start_as_ordinary_user(&[]);
    let capabilities: Value = serde_json::from_str(&server.get("/capabilities").1).unwrap();
    let layers = capabilities["layers"].as_array().unwrap();
    let state =
        |name: &str| layers.iter().find(|layer| layer["name"] == name).map(|layer| layer["state"].clone());
    assert_eq!((state("memory"), state("cpus")), (Some(json!("unenforced")), Some(json!("unenforced"))));
    for name in
        ["processes", "seccomp", "user_namespace", "network", "supervisor", "capabilities", "workspace"]
    {
        assert_eq!(state(name), Some(json!("on")), "{name}: {capabilities}");
    }
    assert!(server.log().contains("not enforced on this host"), "{}", server.log());
}

#[test]
fn everything_is_enforced_for_root() {
    if !is_root() {
        return eprintln!("skipped: only root is sure to have control groups");
    }
    let server = Server::start(&[]);
    let capabilities: Value = serde_json::from_str(&server.get("/capabilities").1).unwrap();
    for layer in capabilities["layers"].as_array().unwrap() {
        assert_eq!(layer["state"], "on", "{layer}");
    }
}

#[test]
fn an_interpreter_that_is_none_stops_the_start_with_a_remedy() {
    for python in ["/nonexistent/python3", "/bin/true"] {
        let flag = format!("embedded.python={python}");
        let allow = ["--allow-unenforced", "memory,cpus,uids"];
        let arguments: Vec<&str> = [&["--listen", "127.0.0.1:0", "--set", &flag], &allow[..]].concat();
        let (status, _, said) = command_line(&arguments, "");
        assert_eq!(status, 2, "{said}");
        assert!(said.contains(python) && said.contains("embedded.python"), "{said}");
    }
}
