# What a run prints.


class Capture:
    """Reads one of a run's pipes: keeps up to its cap, drops the rest, never stops reading."""

    def __init__(self, fd, cap, tell=None):
        self.fd, self.cap, self.parts, self.size, self.cut = fd, cap, [], 0, False
        self.tell = tell  # whom each part is told as it comes
        self.reset = False  # whether its writer died before it had read all that we sent

    def read(self):
        """Reads once, so that a fast writer starves nobody: None where nothing is there, False at the end."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            self.reset = True
            return False
        room = self.cap - self.size
        if data and room:
            self.parts.append(data[:room])
            self.size += len(self.parts[-1])
            if self.tell:
                self.tell(self.parts[-1])
        if len(data) > room and not self.cut:
            self.cut = True
            if self.tell:
                self.tell(b"")  # nothing follows
        return bool(data)

    def empty(self):
        """Reads what is there: 16 reads empty a full pipe."""
        for _ in range(16):
            if not self.read():
                break

    def go_on(self, cap, tell):
        """For the next run, whose answer has what has come since the last one, up to half of what it may have."""
        old = self.bytes()
        self.cut = self.cut or len(old) > cap // 2
        old = old[: cap // 2]
        self.parts, self.size, self.cap, self.tell = [old], len(old), cap, tell
        if tell and old:
            tell(old)
        if tell and self.cut:
            tell(b"")

    def begin_anew(self, cap):
        self.parts, self.size, self.cut, self.tell = [], 0, False, None
        self.cap = min(cap // 2, BETWEEN_BYTES)

    def bytes(self):
        return b"".join(self.parts)
