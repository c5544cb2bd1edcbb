//! The host of the Podman service, as the service tells it.

use serde_json::Value;

use crate::runtime::container::Enforced;

/// What the service tells of itself.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) version: String,
    pub(super) rootless: bool,
    pub(super) cgroup_version: String,
    pub(super) controllers: Vec<String>,
    pub(super) runtime: String,
    /// Ids from 1 on in the containers' user namespace.
    pub(super) subordinate_ids: u32,
}

impl Host {
    pub(super) fn of(info: &Value) -> Host {
        let host = &info["host"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let sizes = |map: &Value| -> u64 {
            let ranges = map.as_array().into_iter().flatten();
            ranges.filter(|range| range["container_id"] != 0).filter_map(|range| range["size"].as_u64()).sum()
        };
        let mappings = &host["idMappings"];
        let ids = sizes(&mappings["uidmap"]).min(sizes(&mappings["gidmap"]));
        Host {
            version: text(&info["version"]["Version"]),
            rootless: host["security"]["rootless"] == true,
            cgroup_version: text(&host["cgroupVersion"]),
            controllers: host["cgroupControllers"].as_array().into_iter().flatten().map(text).collect(),
            runtime: text(&host["ociRuntime"]["name"]),
            subordinate_ids: u32::try_from(ids).unwrap_or(u32::MAX),
        }
    }

    pub(super) fn enforces(&self, controller: &str) -> bool {
        // As root under version 1 the list is empty, and all are there.
        let root = !self.rootless && self.cgroup_version == "v1";
        root || self.controllers.iter().any(|known| known == controller)
    }

    pub(super) fn enforced(&self) -> Enforced {
        Enforced {
            memory: self.enforces("memory"),
            cpus: self.enforces("cpu"),
            processes: self.enforces("pids"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_service_tells_of_itself_is_read_as_podman_4_and_5_tell_it() {
        let info = |version: &str, controllers: Value| {
            json!({"host": {
                "cgroupVersion": version, "cgroupControllers": controllers, "security": {"rootless": true},
                "ociRuntime": {"name": "runc"},
                "idMappings": {
                    "uidmap": [{"container_id": 0, "size": 1}, {"container_id": 1, "size": 65536}],
                    "gidmap": [{"container_id": 0, "size": 1}, {"container_id": 1, "size": 1000}],
                },
            }, "version": {"Version": "4.3.1"}})
        };
        let host = Host::of(&info("v1", json!([])));
        assert_eq!((host.version.as_str(), host.rootless, host.subordinate_ids), ("4.3.1", true, 1000));
        assert!(!host.enforces("memory"));
        let host = Host::of(&info("v2", json!(["memory", "pids"])));
        assert!(host.enforces("memory") && !host.enforces("cpu"));
        assert!(!Host::of(&json!({})).enforces("memory"), "what is not said does not hold");
    }
}
