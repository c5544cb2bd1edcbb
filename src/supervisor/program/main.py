# The start.

PR_SET_DUMPABLE, PR_SET_NAME = 4, 15
PARK_WAIT_S = 5.0  # for a PID 1 whose server has only just left
OOM_FILE = "/proc/self/oom_score_adj"
OOM_SCORE_ADJ = "900"  # of all but the supervisor, whose own comes from the engine


def main():
    if os.getpid() != 1 and not (MODE == BESIDE and is_parked()):
        sys.exit("the supervisor kills every process that it can see: it runs in a sandbox only")
    sys.argv[:] = [CODE_NAME]
    if MODE:
        if hasattr(sys, "orig_argv"):
            sys.orig_argv[1:] = []
        set_dumpable(0)
    sys.dont_write_bytecode = True
    for name in ("LD_BIND_NOW", "MALLOC_TOP_PAD_"):  # they were for the start of this process
        os.environ.pop(name, None)
    os.umask(0o022)
    sys.modules.pop("linecache", None)  # Python 3.13 needs it for -c; its next import is to find the guest's source
    supervisor = Supervisor()
    add_packages()
    warm_up()
    freeze()
    supervisor.serve_forever()


def is_parked():
    """Whether PID 1 is a supervisor that has left everything but the dead to us, or soon does."""
    end = time.monotonic() + PARK_WAIT_S
    while True:
        with open("/proc/1/comm", "rb", 0) as file:
            name = file.read().rstrip(b"\n")
        if name in (PARKED, PARKED_KERNEL):
            Supervisor.kernel_lost = name == PARKED_KERNEL
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.005)


def add_packages():
    """The image's packages, as `site` would add them; no .pth file is read, no customisation run."""
    import site

    site.ENABLE_USER_SITE = False
    packages = site.getsitepackages()
    environment = os.path.dirname(os.path.dirname(sys.executable))
    if os.path.exists(environment + "/pyvenv.cfg"):  # a virtual environment's, and not its base's
        packages = ["%s/lib/python%d.%d/site-packages" % (environment, *sys.version_info[:2])]
    sys.path.extend(path for path in packages if os.path.isdir(path))
    site.setquit()
    site.setcopyright()
    site.sethelper()


def freeze():
    # What lives now is never looked at again: no write, no copied page in the children. Collecting first would
    # cost each start 0.6 ms, and finds next to nothing.
    gc.freeze()


def die_first():
    """Lets a lack of memory take a run before its supervisor.

    Embedded, the server lowers the supervisor's own once there is a first forker; the later ones, and kernels, do this.
    """
    try:
        if not MODE and int(contents(OOM_FILE)) > 0:
            return
        set_dumpable(1)  # else the file is root's
        try:
            with open(OOM_FILE, "w") as file:
                file.write(OOM_SCORE_ADJ)
        finally:
            set_dumpable(0)
    except (OSError, ImportError):
        pass  # then the largest process is taken, which is most likely the run's, too


def set_dumpable(dumpable):
    """At 0 nobody of the same uid can look into this process, or at its descriptors, nor into its forks."""
    prctl(PR_SET_DUMPABLE, dumpable)


def prctl(option, value):
    """Without `ctypes`, which takes 10 ms to import."""
    import _ctypes

    function = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")
    if _ctypes.call_function(function, (option, value, 0, 0, 0)) != 0:
        os._exit(71)


main()
