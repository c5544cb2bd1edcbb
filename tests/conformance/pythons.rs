//! The same on every Python that there is an image of.

use serde_json::json;

use crate::drivers::{self, Driver};

behaviours! {
    "pythons":
    every_python_runs_code,
}

fn every_python_runs_code(driver: &Driver) {
    for image in drivers::images() {
        let flag = format!("image={image}");
        let server = driver.own(&["--set", &flag]);
        let version = image.rsplit(':').next().unwrap_or_default();
        let answer = server.run("u", "import sys\nresult = '%d.%d' % sys.version_info[:2]");
        assert_eq!(answer["result"], version, "{image}: {answer}");
        assert!(server.get("/capabilities").1.contains(&format!("\"python\":\"{version}.")), "{image}");
        let sum = server.run_with("u", "open('f', 'w').write(str(x + y))", json!({"data": {"x": 1, "y": 2}}));
        assert!(sum.get("error").is_none(), "{image}: {sum}");
        assert_eq!(server.run("u", "result = open('f').read()")["result"], "3", "{image}");
        let failed = server.run("u", "def f():\n    return 1 / 0\n\nf()");
        assert_eq!(failed["error_detail"]["name"], "ZeroDivisionError", "{image}: {failed}");
        let traceback = failed["error_detail"]["traceback"].as_str().unwrap();
        assert!(traceback.contains("return 1 / 0") && !traceback.contains("supervisor"), "{traceback}");
        assert_eq!(server.run("u", "x = (")["error_detail"]["kind"], "syntax", "{image}");
        let late = server.run_with("u", "while True: pass", json!({"timeout_ms": 300}));
        assert_eq!(late["error_detail"]["kind"], "timeout", "{image}: {late}");
        assert_eq!(server.run("u", "result = input()")["error_detail"]["name"], "EOFError", "{image}");
        let result =
            server.run("u", "import json, subprocess, threading, asyncio, ctypes, resource\nresult = 1");
        assert_eq!(result["result"], 1, "{image}: {result}");
    }
}
