# Tries from inside what each layer forbids; `result` names the layers with a hole and says which. The variables
# are those of the SandboxSpec that was asked for.
import errno, os, resource, socket

holes = {}


def hole(layer, what):
    holes.setdefault(layer, what)


def refused(layer, what, attempt, *expected):
    """The attempt has to fail, and in a way that the layer explains."""
    try:
        attempt()
    except OSError as error:
        if expected and error.errno not in expected:
            hole(layer, "%s fails with %s" % (what, errno.errorcode.get(error.errno, error.errno)))
    else:
        hole(layer, "%s works" % what)


def connect(address):
    with socket.socket() as probe:
        probe.settimeout(1)
        probe.connect(address)


if os.getuid() == 0 or os.geteuid() == 0:
    hole("user", "runs as root")
refused("supervisor", "opening /proc/1/mem", lambda: open("/proc/1/mem", "rb"))
refused("supervisor", "listing /proc/1/fd", lambda: os.listdir("/proc/1/fd"))
refused("root_file_system", "writing to /usr", lambda: open("/usr/.codesandbox", "w"), errno.EROFS, errno.EACCES)
refused("root_file_system", "writing to /", lambda: open("/.codesandbox", "w"), errno.EROFS, errno.EACCES)
refused("seccomp", "a netlink socket", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
refused("network", "connecting to 192.0.2.1", lambda: connect(("192.0.2.1", 9)), errno.ENETUNREACH, errno.EPERM)
with open("/proc/net/dev") as file:
    names = [line.split(":")[0].strip() for line in file if ":" in line]
if names not in (["lo"], []):
    hole("network", "there are interfaces beside lo: %s" % names)

# The files that a run may write: how much of them there may be, and how they are mounted.
NOSUID_NODEV = 2 | 4
for place, most in (("/workspace", workspace_bytes), ("/tmp", tmp_bytes), ("/dev/shm", shm_bytes)):
    inside = os.statvfs(place)
    if not 0 < inside.f_blocks * inside.f_frsize <= most + 4096:
        hole("workspace", "%s has room for %d bytes" % (place, inside.f_blocks * inside.f_frsize))
    if inside.f_flag & NOSUID_NODEV != NOSUID_NODEV:
        hole("workspace", "%s is not mounted nosuid and nodev" % place)
    with open(place + "/.probe", "w") as file:
        file.write("x")
    os.remove(place + "/.probe")
with open("/proc/self/mountinfo") as file:
    for line in file:
        place, options = line.split()[4:6]
        writable = "rw" in options.split(",") and os.access(place, os.W_OK) and os.path.isdir(place)
        if writable and place not in ("/workspace", "/tmp", "/dev/shm", "/dev/mqueue") and not place.startswith("/proc"):
            hole("root_file_system", "%s can be written to" % place)

# Limits of each process, and of the control group where it can be seen from inside.
def is_within(name, most):
    return 0 <= resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1] <= most


for name, most in (("NOFILE", open_files), ("CORE", 0)):
    if not is_within(name, most):
        hole("resources", "RLIMIT_%s is not limited" % name)


def group(controller, version_1, version_2):
    """The numbers of a control file; none where it cannot be seen."""
    for path in ("/sys/fs/cgroup/%s" % version_2, "/sys/fs/cgroup/%s/%s" % (controller, version_1)):
        try:
            with open(path) as file:
                return file.read().split()
        except OSError:
            pass
    return []


found = group("memory", "memory.limit_in_bytes", "memory.max")
if found and not (found[0].isdigit() and int(found[0]) <= memory_bytes):
    hole("memory", "the control group's limit is %s" % found[0])
found = group("pids", "pids.max", "pids.max")
if not (found and found[0].isdigit() and int(found[0]) <= processes) and not is_within("NPROC", processes):
    hole("processes", "neither RLIMIT_NPROC nor the control group, %s, is that small" % (found or "which is not seen"))
period = int((group("cpu", "cpu.cfs_period_us", "cpu.max")[-1:] or ["100000"])[0])
quota = (group("cpu", "cpu.cfs_quota_us", "cpu.max")[:1] or [None])[0]
if quota is not None and not (quota.isdigit() and int(quota) <= cpus * period * 1.01 + 1000):
    hole("cpus", "the control group's quota is %s of %d" % (quota, period))
result = holes
