# The kernel's own process, whose runs share one scope.

ONLY_AST = 0x400  # as ast.PyCF_ONLY_AST
BUILTINS = sys.modules["builtins"]
UNINTERRUPTIBLE = 70  # exit status of a kernel that cannot say so any more
BEGUN = b"\1"  # a kernel says so where nobody waits for it: from here on SIGINT is a KeyboardInterrupt


def kernel_process(channel, out, err, begun, limits):
    """The whole life of a kernel: one task after another in one scope, whose threads go on between them."""
    pid = os.getpid()
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)
    os.close(out), os.close(err)
    Cell.begun = begun
    while True:
        ready = stands_in_ahead()
        source, data, stdin, narrowed = read_task(channel)
        if stdin or not ready:
            stand_in(stdin)
        if narrowed:
            narrow(loads(narrowed.decode()), hard=False)
        outcome = outcome_to_tell(source, data, limits, run_cell)
        if os.getpid() != pid:
            os._exit(0)  # a fork of the guest's that came to the end of the code
        give_room()
        write_all(channel, outcome)
        let_answer()


def stands_in_ahead():
    """For a run without input. Where the last run has left no way to do so the kernel dies with the next, not now: its
    answer is on its way."""
    try:
        stand_in(b"")
        return True
    except BaseException:
        return False


def stand_in(stdin):
    """A new standard input for each run: the last one's may be at its end."""
    if stdin:
        feed(stdin)
    else:
        null = os.open(os.devnull, os.O_RDONLY)
        if null:  # the guest has closed its own
            os.dup2(null, 0)
            os.close(null)
    sys.stdin = sys.__stdin__ = open(0, closefd=False, encoding="utf-8", errors="surrogateescape")


def run_cell(source, limits, extras):
    """In the scope that stays: the value of `result` where this run sets it, else of a last expression, as JSON."""
    try:
        write_all(Cell.begun, BEGUN)
    except OSError:
        os._exit(UNINTERRUPTIBLE)  # an earlier run has closed it
    Cell.number += 1
    name = CELL_NAME % Cell.number
    FINDER.remember(name, source)
    tree = compiled(source, name, ONLY_AST)
    last = tree.body[-1] if tree.body else None
    expression = None
    if type(last).__name__ == "Expr":
        import _ast

        tree.body.pop()
        expression = compiled(_ast.Expression(last.value), name, mode="eval")
    with Results():
        try:
            value = execute_cell(compiled(tree, name), expression)
            extras.take_figures()
        finally:
            extras.close_figures()
        if "result" in SCOPE:
            extras.show(SCOPE["result"], False)
            return encode_result(SCOPE["result"], limits["result"])
    return shown_result(value, limits, extras)


class Cell:
    """What a kernel knows of its runs."""

    number, begun = 0, None


def execute_cell(code, expression):
    try:
        exec(code, SCOPE)
        return eval(expression, SCOPE) if expression else None
    except SystemExit as error:
        end_of(error)
    except BaseException as error:
        raise failure_of(error)


def shown_result(value, limits, extras):
    """Of an expression: what JSON does not have is no failure, but only shown."""
    if value is None:
        return b"null"
    try:
        encoded = encode_result(value, limits["result"])
        extras.show(value, False)
        return encoded
    except Failure as failure:
        if failure.detail["kind"] == "result_too_large":
            raise
        extras.show(value, True)
        return b"null"


class Results:
    """Tells a `result` that this run sets from an earlier one's, which can be read all the same: as a builtin."""

    def __enter__(self):
        self.old = SCOPE.pop("result", self)
        if self.old is not self:
            BUILTINS.result = self.old

    def __exit__(self, *_):
        if self.old is not self:
            vars(BUILTINS).pop("result", None)
            SCOPE.setdefault("result", self.old)
