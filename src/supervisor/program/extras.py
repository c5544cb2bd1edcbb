# What an answer may hold beside the result.

ARTIFACT_BYTES = 100  # of each, beside its content
PLAIN_CHARACTERS = 10_000  # of a value as Python prints it


def extras_cap(limits):
    return limits["artifacts"] and limits["artifacts"] + 4096  # with their names


class Extras:
    """What an answer may hold beside the result: figures, and a value as a page would show it."""

    DISPLAYS = (
        ("text/html", "_repr_html_"),
        ("text/markdown", "_repr_markdown_"),
        ("text/latex", "_repr_latex_"),
        ("image/svg+xml", "_repr_svg_"),
        ("image/png", "_repr_png_"),
        ("image/jpeg", "_repr_jpeg_"),
    )

    def __init__(self, room):
        self.room = room  # bytes; without any there are no extras
        self.artifacts, self.display, self.cut = [], {}, False

    def fits(self, size):
        if size <= self.room:
            self.room -= size
            return True
        self.cut = True
        return False

    def take_figures(self):
        """The figures that are still open, as PNG."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if not pyplot or not self.room:
            return
        try:
            import io

            for number in pyplot.get_fignums():
                image = io.BytesIO()
                pyplot.figure(number).savefig(image, format="png")
                encoded = base64(image.getvalue())
                if self.fits(len(encoded) + ARTIFACT_BYTES):
                    name = "figure-%d.png" % number
                    self.artifacts.append({"name": name, "media_type": "image/png", "base64": encoded})
        except Exception:
            pass  # a picture that cannot be drawn is no failure of the run

    def close_figures(self):
        """So that an interpreter that stays shows each of them once."""
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")

    def show(self, value, anyhow):
        """A value by its own idea of how it looks; without one, `anyhow`, as Python prints it."""
        if not self.room:
            return
        shown = {}
        for media_type, method in self.DISPLAYS:
            try:
                look = getattr(type(value), method, None)
                drawn = look and look(value)
                if isinstance(drawn, (bytes, str)):
                    shown[media_type] = base64(drawn) if isinstance(drawn, bytes) else drawn
            except Exception:
                pass
        if shown or anyhow:
            try:
                shown["text/plain"] = repr(value)[:PLAIN_CHARACTERS]
            except Exception:
                pass
        for media_type, text in shown.items():
            text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no JSON
            if self.fits(len(dumps(text).encode()) - 2):  # as it is sent, without its quotes
                self.display[media_type] = text

    def encoded(self):
        parts = {"artifacts": self.artifacts, "display": self.display, "cut": self.cut}
        parts = {name: part for name, part in parts.items() if part}
        return dumps(parts).encode() if parts else b""


def base64(data):
    from binascii import b2a_base64

    return b2a_base64(data, newline=False).decode()
