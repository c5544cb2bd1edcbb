# What came of a run, as its process says it: a result, or what went wrong.

RESULT, ERROR = 1, 2
OUTCOME = struct.Struct(">BII")  # what the run's process says of itself: kind, lengths of the payload and the extras


def first_frame(data):
    """The outcome that the run's process sent: kind, payload, extras; None where there is no whole one."""
    if len(data) < OUTCOME.size:
        return None
    kind, length, more = OUTCOME.unpack_from(data)
    end = OUTCOME.size + length
    payload, extras = data[OUTCOME.size : end], data[end : end + more]
    whole = len(payload) == length and len(extras) == more and kind in (RESULT, ERROR)
    return (kind, payload, extras) if whole else None


class Failure(Exception):
    """A run that failed: what `error_detail` says of it."""

    def __init__(self, kind, name, value, traceback=""):
        self.detail = {"kind": kind, "name": name, "value": value, "traceback": traceback}


def failure_of(error, syntax=False):
    give_room()
    kind = "raised"
    if syntax:
        kind = "syntax"
    elif isinstance(error, MemoryError):
        kind = "out_of_memory"
    try:
        value = str(error)
    except Exception:
        value = "<exception str() failed>"
    return Failure(kind, str(type(error).__name__), value, format_error(error, syntax))


def end_of(error):
    """What `sys.exit` means: nothing where it is a success, a Failure otherwise."""
    code = error.code
    if code is None or (isinstance(code, int) and code == 0):
        return
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    raise Failure("exited", "SystemExit", "exited with status %d" % (code & 0xFF))


def format_error(error, syntax=False):
    """Python's own traceback without the frames of this program.

    Imported here, where it costs a failed run 9 ms: held ready in the supervisor it costs each run 0.3 ms
    of CPU, in pages to be shared, copied and given back.
    """
    try:
        hide_own_frames(error)
        import traceback

        if syntax:
            lines = traceback.format_exception_only(type(error), error)
        else:
            lines = traceback.format_exception(type(error), error, error.__traceback__)
        return "".join(lines).rstrip("\n")
    except Exception:
        return str(type(error).__name__)  # its __str__ fails, or there is no memory left for more


def hide_own_frames(error):
    """In the whole chain: what led to an error begins in this program, too."""
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        frames = error.__traceback__
        while frames and frames.tb_frame.f_globals is globals():
            frames = frames.tb_next
        error.__traceback__ = frames
        pending += error.__cause__, error.__context__


def encode_result(value, limit):
    try:
        allow_digits(0)  # integers of any size: the time limit bounds what they cost
        encoded = dumps(value).encode()
    except (KeyboardInterrupt, MemoryError):
        raise
    except RecursionError:
        raise Failure("result_invalid", "RecursionError", "result is nested too deeply")
    except BaseException as error:
        why = None
        try:
            why = blame(value, "result")
        except Exception:
            pass
        raise Failure("result_invalid", type(error).__name__, why or "result: %s" % error)
    if len(encoded) > limit:
        message = "result is %d bytes of JSON, more than the %d allowed" % (len(encoded), limit)
        raise Failure("result_too_large", "ValueError", message)
    return encoded


def blame(value, path, depth=0):
    """Says which part of a result JSON does not have; None where no part is to blame."""
    if depth > 200:
        return "%s is nested too deeply" % path
    if value is None or isinstance(value, (bool, int)):
        return None
    if isinstance(value, float):
        return None if value - value == 0 else "%s is %r, which JSON does not have" % (path, value)
    if isinstance(value, str):
        try:
            return value.encode() and None
        except UnicodeEncodeError:
            return "%s holds a lone surrogate, which is no Unicode text" % path
    if isinstance(value, (list, tuple)):
        parts = ((item, "%s[%d]" % (path, index)) for index, item in enumerate(value))
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int, float, bool, type(None))):
                return "a key of %s is of type %s, which JSON does not have" % (path, type(key).__name__)
        parts = ((item, "%s[%r]" % (path, key)) for key, item in value.items())
    else:
        return "%s is of type %s, which JSON does not have" % (path, type(value).__name__)
    for item, item_path in parts:
        found = blame(item, item_path, depth + 1)
        if found:
            return found
    return None


INTERRUPTED = b'{"kind":"raised","name":"KeyboardInterrupt","value":"","traceback":""}'
FULL = b'{"kind":"out_of_memory","name":"MemoryError","value":"","traceback":""}'
FULL = OUTCOME.pack(ERROR, len(FULL), 0) + FULL  # whole, since nothing can be made any more
