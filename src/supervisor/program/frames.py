# What the server and the supervisor say to each other, on descriptors 0 and 1: see protocol.rs.

HELLO, RUN, INTERRUPT = 1, 2, 3
HELLO_ANSWER, DONE, OUTPUT = 129, 130, 131
FILE, FILE_ANSWER = 4, 132
HEADER = struct.Struct(">QBI")  # nonce, kind, length of the payload
LENGTH = struct.Struct(">I")
# Stands ahead of each hello: what came before it may be a frame that a dead server left unfinished. Of bytes that no
# text has, and made here, lest a file that holds this program be taken for one.
FRESH_START = bytes([0xF5, 0xC0, 0xFE] * 2 + [0xF5, 0xC0, 255, 0, 0, 0, 3, 0xFE, 0xC0, 0xF5])
# The loader's: the engine's own stream, kept for when the shorter one that the server has now comes to its end.
ENGINE = globals().get("engine")


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def join(sections):
    return b"".join(part for section in sections for part in (LENGTH.pack(len(section)), section))


def send(nonce, kind, *sections):
    payload = join(sections)
    try:
        write_all(1, HEADER.pack(nonce, kind, len(payload)) + payload)
    except (BrokenPipeError, ConnectionResetError):
        if not ENGINE:
            raise
        # Who would hear it is gone, as the next read says; another one may come.


def listen_to_engine():
    """The server is gone, or has let go of us. False where there is no other stream on which one may come."""
    global ENGINE
    if not ENGINE:
        return False
    for target, fd in enumerate(ENGINE):
        os.dup2(fd, target)
        os.close(fd)
    ENGINE = None
    return True


def split(payload):
    sections, at = [], 0
    while at < len(payload):
        (length,) = LENGTH.unpack_from(payload, at)
        at += LENGTH.size
        sections.append(payload[at : at + length])
        at += length
    return sections


class Input:
    """The frames that the server sends, in order."""

    def __init__(self):
        self.buffer = bytearray()

    def fill(self):
        try:
            data = os.read(0, 1 << 16)
        except ConnectionResetError:  # it left something unread
            data = b""
        if not data:
            self.buffer.clear()
            if not listen_to_engine():
                leave()
        seen = max(len(self.buffer) - len(FRESH_START), 0)
        self.buffer += data
        at = self.buffer.rfind(FRESH_START, seen)
        if at >= 0:
            del self.buffer[: at + len(FRESH_START)]

    def take(self):
        """The next frame where it is here as a whole, else None."""
        if len(self.buffer) < HEADER.size:
            return None
        nonce, kind, length = HEADER.unpack_from(self.buffer)
        end = HEADER.size + length
        if len(self.buffer) < end:
            return None
        payload = bytes(memoryview(self.buffer)[HEADER.size : end])
        del self.buffer[:end]
        return nonce, kind, payload
