//! The files of a session from outside: in, out, away, beside a run, and never beyond the workspace.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::drivers::Driver;
use crate::support::{Server, eventually, header};

behaviours! {
    "files":
    what_is_put_is_there_for_programs_and_comes_back_byte_for_byte,
    what_programs_write_can_be_got_and_listed,
    a_file_that_is_put_makes_the_session_and_the_directories,
    what_is_removed_is_gone_with_all_that_is_in_it,
    a_path_that_leaves_the_workspace_is_refused,
    what_is_no_regular_file_is_refused_and_holds_up_nobody,
    files_go_in_and_out_while_a_program_runs,
    a_program_runs_while_files_go_in_and_out,
    a_full_workspace_is_told_with_what_is_left,
    a_directory_comes_and_goes_as_a_tar,
    a_tar_that_leads_out_is_refused,
    times_and_mazes_that_a_program_makes_hold_up_nobody,
    without_a_session_there_are_no_files,
}

const TAR: &str = "application/x-tar";

fn files(user_id: &str) -> String {
    format!("/sessions/{user_id}/files")
}

fn listed(server: &Server, user_id: &str) -> Vec<Value> {
    let (status, text) = server.get(&files(user_id));
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn paths(server: &Server, user_id: &str) -> Vec<String> {
    listed(server, user_id).iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
}

/// Bytes of every value, in no order that a text could have.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn code_of(body: &[u8]) -> String {
    let told: Value = serde_json::from_slice(body).unwrap();
    told["code"].as_str().unwrap().to_owned()
}

fn what_is_put_is_there_for_programs_and_comes_back_byte_for_byte(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for length in [0, 1, 65_535, 65_536, 65_537, 1_000_000] {
        let path = format!("{}/x{length}", files(&u));
        let content = bytes(length);
        let (status, headers, _) = server.send("PUT", &path, &[], &content);
        assert_eq!(status, 201, "{length}");
        let tag = header(&headers, "etag").unwrap().to_owned();
        let (status, headers, got) = server.send("GET", &path, &[], b"");
        assert_eq!((status, got == content), (200, true), "{length}");
        assert_eq!(header(&headers, "etag").unwrap(), tag, "{length}");
        assert_eq!(header(&headers, "content-length").unwrap(), length.to_string());
        let code =
            format!("d = open('x{length}', 'rb').read()\nimport zlib\nresult = [len(d), zlib.crc32(d)]");
        let answer = server.run(&u, &code);
        assert_eq!(answer["result"][0], length, "{answer}");
    }
    let path = format!("{}/x1", files(&u));
    assert_eq!(server.put(&path, "again"), 204, "replaced");
    assert_eq!(server.get(&path).1, "again");
    assert!(server.run(&u, "pass")["workspace_files"].as_array().unwrap().len() > 5);
}

fn what_programs_write_can_be_got_and_listed(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import os\nos.makedirs('d/e')\nopen('d/e/f', 'w').write('hello')\nos.symlink('d/e/f', 'l')\n\
        open(b'\\xff', 'w').write('odd')\nos.mkfifo('p')\nos.utime('d/e/f', ns=(0, 1_600_000_000_123_000_000))";
    server.run(&u, code);
    let listed = listed(&server, &u);
    let find = |path: &str| listed.iter().find(|entry| entry["path"] == path).unwrap().clone();
    let file = json!({"path": "d/e/f", "size": 5, "modified_at": "2020-09-13T12:26:40.123Z", "kind": "file"});
    assert_eq!(find("d/e/f"), file);
    assert_eq!((&find("d")["kind"], &find("d/e")["kind"]), (&json!("directory"), &json!("directory")));
    assert_eq!((&find("l")["kind"], &find("p")["kind"]), (&json!("symlink"), &json!("other")));
    assert_eq!((&find("%FF")["encoded"], &find("%FF")["size"]), (&json!(true), &json!(3)));
    assert_eq!(listed.len(), 6, "{listed:?}");
    for (path, content) in [("d/e/f", "hello"), ("l", "hello"), ("%FF", "odd")] {
        assert_eq!(server.get(&format!("{}/{path}", files(&u))), (200, content.to_owned()), "{path}");
    }
}

fn a_file_that_is_put_makes_the_session_and_the_directories(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    assert_eq!(server.get(&format!("/sessions/{u}")).0, 404);
    assert_eq!(server.put(&format!("{}/a/b%20c/%C3%A9", files(&u)), "x"), 201);
    assert!(server.get(&format!("/sessions/{u}")).1.contains("\"idle\""));
    let answer = server.run(&u, "import os\nresult = [open('a/b c/é').read(), os.stat('a').st_mode & 0o777]");
    assert_eq!(answer["result"], json!(["x", 0o755]), "{answer}");
    assert_eq!(answer.get("session"), None, "{answer}");
    assert_eq!(server.put(&format!("{}/a", files(&u)), "x"), 409, "a directory is in the way");
    assert_eq!(server.put(&format!("{}/a/b%20c/%C3%A9/x", files(&u)), "x"), 409, "a file is");
    let other = format!("{u}%2F%3F%20");
    assert_eq!(server.put(&format!("{}/f", files(&other)), "other"), 201);
    assert_eq!(server.run(&format!("{u}/? "), "result = open('f').read()")["result"], "other");
}

fn what_is_removed_is_gone_with_all_that_is_in_it(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import os\nopen('keep', 'w')\nopen('one', 'w')\nos.symlink('keep', 'link')\n\
        for i in range(1500): os.makedirs(f'many/{i % 7}', exist_ok=True); open(f'many/{i % 7}/{i}', 'w')\n\
        os.makedirs('deep/' + '/'.join('abcdefghij' * 6)); open('deep/a/b/c/f', 'w')\nos.symlink('/etc', 'deep/etc')";
    server.run(&u, code);
    for path in ["one", "link", "many", "deep"] {
        let path = format!("{}/{path}", files(&u));
        assert_eq!(server.send("DELETE", &path, &[], b"").0, 204, "{path}");
        assert_eq!(server.send("DELETE", &path, &[], b"").0, 404, "{path}: a second time");
        assert_eq!(server.get(&path).0, 404, "{path}");
    }
    assert_eq!(paths(&server, &u), ["keep"]);
    assert_eq!(server.send("DELETE", &files(&u), &[], b"").0, 405, "that is DELETE /sessions/{u}");
}

fn a_path_that_leaves_the_workspace_is_refused(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import os\nos.mkdir('in')\nopen('in/f', 'w').write('inside')\nfor name, target in [\n\
        ('passwd', '/etc/passwd'), ('environ', '/proc/self/environ'), ('root', '/'), ('up', '..'),\n\
        ('up2', 'in/../../etc'), ('fds', '/proc/self/fd'), ('tmp', '/tmp'), ('loop', 'loop'), ('near', '/workspacex'),\n\
        ('good', '/workspace/in/f'), ('here', '/workspace'), ('back', 'in/../in'), ('in/up', '..')]: os.symlink(target, name)\n\
        open('/tmp/secret', 'w').write('secret')";
    server.run(&u, code);
    let f = files(&u);
    for path in [
        "passwd",
        "environ",
        "root/etc/passwd",
        "up/etc/passwd",
        "up/workspace/in/f",
        "up2/passwd",
        "fds/0",
        "tmp/secret",
        "loop",
        "near",
        "in/up/up/etc/passwd",
        "%2e%2e/etc/passwd",
        "in/%2e%2e/%2E%2e/etc/passwd",
        "%2Fetc/passwd",
        "in//f",
        "in/f%00",
        ".",
    ] {
        let (status, _, body) = server.send("GET", &format!("{f}/{path}"), &[], b"");
        assert_eq!((status, &*code_of(&body)), (400, "invalid_request"), "GET {path}");
        assert_eq!(server.put(&format!("{f}/{path}"), "overwritten"), 400, "PUT {path}");
    }
    for path in ["root/tmp/secret", "tmp/secret", "up/tmp/secret"] {
        assert_eq!(server.send("DELETE", &format!("{f}/{path}"), &[], b"").0, 400, "DELETE {path}");
    }
    for path in ["good", "here/in/f", "back/f", "in/up/in/f", "here/here/in/up/good"] {
        assert_eq!(server.get(&format!("{f}/{path}")), (200, "inside".to_owned()), "{path}");
    }
    assert_eq!(server.run(&u, "result = open('/tmp/secret').read()")["result"], "secret");
    assert_eq!(
        server.send("DELETE", &format!("{f}/passwd"), &[], b"").0,
        204,
        "the symlink itself is inside"
    );
    assert!(!paths(&server, &u).contains(&"passwd".to_owned()));
}

fn what_is_no_regular_file_is_refused_and_holds_up_nobody(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import os, socket\nos.mkfifo('fifo')\nsocket.socket(socket.AF_UNIX).bind('socket')\nos.mkdir('d')\n\
        open('closed', 'w').write('x')\nos.chmod('closed', 0)";
    server.run(&u, code);
    let begun = Instant::now();
    for (path, status) in [("fifo", 400), ("socket", 400), ("d", 400), ("closed", 403), ("none", 404)] {
        let path = format!("{}/{path}", files(&u));
        assert_eq!(server.get(&path).0, status, "{path}");
    }
    assert_eq!(server.put(&format!("{}/fifo", files(&u)), "x"), 400);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(server.run(&u, "result = 1")["result"], 1);
}

fn files_go_in_and_out_while_a_program_runs(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import os, time\nopen('out', 'w').write('of the run')\nprint('begun', flush=True)\n\
        end = time.monotonic() + 20\nwhile not os.path.exists('in') and time.monotonic() < end: time.sleep(0.01)\nresult = len(open('in').read())";
    std::thread::scope(|scope| {
        let run = scope.spawn(|| server.run(&u, code));
        let f = files(&u);
        eventually("the run has written", || server.get(&format!("{f}/out")).0 == 200);
        assert_eq!(server.get(&format!("{f}/out")).1, "of the run");
        assert!(paths(&server, &u).contains(&"out".to_owned()));
        assert_eq!(server.put(&format!("{f}/part"), bytes(300_000)), 201);
        assert_eq!(server.send("GET", &format!("{f}/part"), &[], b"").2, bytes(300_000));
        assert_eq!(server.send("DELETE", &format!("{f}/part"), &[], b"").0, 204);
        assert!(server.get(&format!("/sessions/{u}")).1.contains("running"));
        assert_eq!(server.put(&format!("{f}/in"), "x".repeat(200_000)), 201);
        let answer = run.join().unwrap();
        assert_eq!(answer["result"], 200_000, "it sees the file as a whole: {answer}");
    });
}

fn a_program_runs_while_files_go_in_and_out(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let f = files(&u);
    let content = bytes(8 << 20);
    assert_eq!(server.put(&format!("{f}/large"), &content), 201);
    std::thread::scope(|scope| {
        let transfers: Vec<_> = (0..3)
            .map(|turn| {
                let (server, content, f) = (&server, &content, &f);
                scope.spawn(move || {
                    assert_eq!(server.put(&format!("{f}/{turn}"), content), 201);
                    assert!(server.send("GET", &format!("{f}/large"), &[], b"").2 == *content);
                })
            })
            .collect();
        for turn in 0..20 {
            let answer = server.run(&u, &format!("print('x' * 100_000)\nresult = {turn}"));
            assert_eq!(answer["result"], turn, "{answer}");
        }
        transfers.into_iter().for_each(|transfer| transfer.join().unwrap());
    });
    let code = "result = all(open(str(i), 'rb').read() == open('large', 'rb').read() for i in range(3))";
    assert_eq!(server.run(&u, code)["result"], true);
}

fn a_full_workspace_is_told_with_what_is_left(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.workspace=2MiB"]);
    let f = files(&u);
    assert_eq!(server.put(&format!("{f}/kept"), bytes(1 << 20)), 201);
    let (status, _, body) = server.send("PUT", &format!("{f}/more"), &[], &bytes(1_500_000));
    let told: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, &told["code"]), (507, &json!("insufficient_storage")), "{told}");
    let left = told["available_bytes"].as_u64().unwrap();
    assert!((500_000..=(1 << 20)).contains(&left), "{told}");
    assert_eq!(paths(&server, &u), ["kept"], "nothing of it is left");
    assert_eq!(
        server.put(&format!("{f}/fits"), bytes(left as usize - 16_384)),
        201,
        "what is left can be used"
    );
    assert_eq!(server.send("GET", &format!("{f}/kept"), &[], b"").2, bytes(1 << 20));
    assert_eq!(server.send("DELETE", &format!("{f}/kept"), &[], b"").0, 204);
    assert_eq!(server.put(&format!("{f}/more"), bytes(1 << 20)), 201);
}

fn a_directory_comes_and_goes_as_a_tar(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let f = files(&u);
    let code = "import os\nos.makedirs('d/empty')\nlong = 'd/' + 'n' * 120\nos.makedirs(long)\n\
        open(long + '/' + 'm' * 120, 'w').write('long')\nopen('d/f', 'wb').write(bytes(range(256)) * 1000)\n\
        open('d/x', 'w').write('#!')\nos.chmod('d/x', 0o755)\nos.symlink('f', 'd/l')\nos.mkfifo('d/p')\n\
        open('d/none', 'w')\nopen('aside', 'w')\nos.utime('d/f', (0, 1e9))";
    server.run(&u, code);
    let (status, headers, tar) = server.send("GET", &format!("{f}/d"), &[("accept", TAR)], b"");
    assert_eq!((status, header(&headers, "content-type")), (200, Some(TAR)));
    let v = format!("{u}-copy");
    let g = files(&v);
    let (status, _, body) = server.send("PUT", &format!("{g}/e"), &[("content-type", TAR)], &tar);
    assert_eq!(status, 204, "{}", String::from_utf8_lossy(&body));
    assert_eq!(server.put(&format!("{g}/d.tar"), &tar), 201);
    let code = "import os, tarfile\nlong = 'e/' + 'n' * 120\nt = tarfile.open('d.tar')\n\
        result = [sorted(os.listdir('e')), open('e/f', 'rb').read() == bytes(range(256)) * 1000,\n\
        open(long + '/' + 'm' * 120).read(), os.stat('e/x').st_mode & 0o777, os.readlink('e/l'), os.stat('e/f').st_mtime,\n\
        len(t.getnames()), t.getmember('f').mtime, t.getmember('l').linkname]";
    let answer = server.run(&v, code);
    let names = json!(["empty", "f", "l", "n".repeat(120), "none", "x"]);
    let expected = json!([names, true, "long", 0o755, "f", 1e9, 7, 1_000_000_000, "f"]);
    assert_eq!(answer["result"], expected, "{answer}");
    let (status, _, whole) = server.send("GET", &f, &[("accept", TAR)], b"");
    assert!(status == 200 && whole.len() > tar.len());
    // As other programs make them.
    let code = "import tarfile, io\nfor name, kind in [('gnu', tarfile.GNU_FORMAT), ('pax', tarfile.PAX_FORMAT)]:\n\
        \x20with tarfile.open(name + '.tar', 'w', format=kind) as t: t.add('e', name)\nresult = 1";
    assert_eq!(server.run(&v, code)["result"], 1);
    for name in ["gnu", "pax"] {
        let made = server.send("GET", &format!("{g}/{name}.tar"), &[], b"").2;
        let (status, _, body) = server.send("PUT", &g, &[("content-type", TAR)], &made);
        assert_eq!(status, 204, "{name}: {}", String::from_utf8_lossy(&body));
        let code = format!("long = '{name}/' + 'n' * 120\nresult = open(long + '/' + 'm' * 120).read()");
        assert_eq!(server.run(&v, &code)["result"], "long");
    }
}

fn a_tar_that_leads_out_is_refused(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import tarfile, io\ndef make(name, member, content=b''):\n\
        \x20with tarfile.open(name, 'w') as t: member.size = len(content); t.addfile(member, io.BytesIO(content))\n\
        def info(name, kind=tarfile.REGTYPE, link=''):\n i = tarfile.TarInfo(name); i.type = kind; i.linkname = link; return i\n\
        import os\nos.symlink('/tmp', 'tmp')\nos.makedirs('d')\n\
        bad = [info('/tmp/x'), info('../x'), info('a/../../x'), info('tmp/x'), info('l', tarfile.SYMTYPE, '/etc/passwd'),\n\
        info('l', tarfile.SYMTYPE, '../x'), info('l', tarfile.SYMTYPE, 'd/../x'), info('d/l', tarfile.SYMTYPE, '../../x'), info('h', tarfile.LNKTYPE, '/etc/passwd'),\n\
        info('h', tarfile.LNKTYPE, '../x'), info('c', tarfile.CHRTYPE), info('b', tarfile.BLKTYPE), info('p', tarfile.FIFOTYPE)]\n\
        for number, member in enumerate(bad): make(f'/workspace/d/{number}.tar', member)\nresult = [i.name for i in bad]";
    let names = server.run(&u, code)["result"].as_array().unwrap().clone();
    let before = paths(&server, &u);
    for (number, name) in names.iter().enumerate() {
        let tar = server.send("GET", &format!("{}/d/{number}.tar", files(&u)), &[], b"").2;
        let (status, _, body) = server.send("PUT", &files(&u), &[("content-type", TAR)], &tar);
        let told = String::from_utf8(body).unwrap();
        assert!(status == 400 && told.contains(name.as_str().unwrap()), "{number} {name}: {status} {told}");
    }
    assert_eq!(paths(&server, &u), before);
    assert_eq!(server.run(&u, "import os\nresult = os.listdir('/tmp')")["result"], json!([]));
}

fn times_and_mazes_that_a_program_makes_hold_up_nobody(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let maze = "import os\nopen('f', 'w').write('kept')\nos.utime('f', (1e11, 1e11))\n\
                for _ in range(8000): os.mkdir('a'); os.chdir('a')\n\
                os.symlink('../a/' * 800 + 's', 's')\nos.chdir('/workspace')\nd = os.open('.', os.O_RDONLY)\n\
                for link in ['s', 'k1', 'k2', 'k3']:\n    \
                    os.symlink('a/' * 2000 + ({'s': 'k1', 'k1': 'k2', 'k2': 'k3', 'k3': 's'})[link], link, dir_fd=d)\n    \
                    for _ in range(2000):\n        e = os.open('a', os.O_RDONLY, dir_fd=d); os.close(d); d = e";
    let made = server.run(&u, maze);
    assert!(made.get("error").is_none(), "{made}");
    let begun = Instant::now();
    let (status, text) = server.get(&format!("{}/s", files(&u)));
    assert_eq!(status, 400, "{text}");
    assert!(begun.elapsed() < Duration::from_secs(5), "it gives up, and its deadline is not reached");
    let (status, text) = server.get(&format!("{}/f", files(&u)));
    assert_eq!((status, text.as_str()), (200, "kept"));
    let answer = server.run(&u, "result = open('f').read()");
    assert_eq!((&answer["result"], answer.get("session")), (&json!("kept"), None), "{answer}");
}

fn without_a_session_there_are_no_files(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for (method, path) in [("GET", files(&u)), ("GET", files(&u) + "/x"), ("DELETE", files(&u) + "/x")] {
        assert_eq!(server.send(method, &path, &[], b"").0, 404, "{method}");
        assert_eq!(server.get(&format!("/sessions/{u}")).0, 404, "and none was made");
    }
}
