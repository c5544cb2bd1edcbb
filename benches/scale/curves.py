"""The figure: a panel for each measure, a curve for each driver, both scales logarithmic."""

import math

from payloads import short
from plot import text, write

WIDTH, HEIGHT = 180, 130  # of a panel's grid
LEFT, TOP, CELL, ROW = 44, 40, 240, 200  # before and above it; from one panel to the next
STYLE = """
.curve { fill: none } .dashed { stroke-dasharray: 4 3; stroke-width: 1.5 }
"""


class Scale:
    """From the power of ten below the least value to the one above the most."""

    def __init__(self, values, length):
        self.low = math.floor(math.log10(min(values)) + 1e-9)
        self.high = max(math.ceil(math.log10(max(values)) - 1e-9), self.low + 1)
        self.length = length

    def at(self, value):
        return self.length * (math.log10(value) - self.low) / (self.high - self.low)

    def powers(self):
        return [10.0**power for power in range(self.low, self.high + 1)]


class Panel:
    """`curves` has for each the driver, whether it is dashed, and points. A size of 0 stands at 1; no cost is below
    `least`."""

    def __init__(self, title, note, curves, least=0.01):
        self.title, self.note = title, note
        self.curves = [
            (name, dashed, [(max(x, 1), max(y, least)) for x, y in points]) for name, dashed, points in curves
        ]
        xs, ys = zip(*(point for _, _, points in self.curves for point in points))
        self.x, self.y = Scale(xs, WIDTH), Scale(ys, HEIGHT)

    def parts(self):
        yield text(0, -24, self.title, "title")
        yield text(0, -10, self.note, "small")
        yield from self.grid()
        for name, dashed, points in self.curves:
            classes = "line curve%s%s" % (" ours" * (name == "embedded"), " dashed" * dashed)
            places = " ".join("%.1f,%.1f" % (self.x.at(x), HEIGHT - self.y.at(y)) for x, y in points)
            yield '<polyline points="%s" class="%s"/>' % (places, classes)

    def grid(self):
        line = '<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" class="grid"/>'
        for value in self.x.powers():
            x = self.x.at(value)
            yield line % (x, x, 0, HEIGHT)
            yield text(x, HEIGHT + 14, short(value), "small", "middle")
        for value in self.y.powers():
            y = HEIGHT - self.y.at(value)
            yield line % (0, WIDTH, y, y)
            yield text(-5, y + 4, "%g" % value, "small", "end")


def draw(path, rows):
    columns = max(map(len, rows))
    parts = []
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            parts.append('<g transform="translate(%d %d)">' % (LEFT + CELL * column, TOP + ROW * row))
            parts += [*panel.parts(), "</g>"]
    bottom = ROW * len(rows) + 14
    parts.append('<polyline points="%d,%d %d,%d" class="line ours"/>' % (LEFT, bottom, LEFT + 24, bottom))
    parts.append(text(LEFT + 30, bottom + 4, "embedded", "small"))
    parts.append('<polyline points="%d,%d %d,%d" class="line"/>' % (LEFT + 90, bottom, LEFT + 114, bottom))
    parts.append(text(LEFT + 120, bottom + 4, "Docker", "small"))
    parts.append(text(LEFT + 180, bottom + 4, "Both scales of each panel are logarithmic.", "small"))
    write(path, LEFT + CELL * columns, bottom + 16, parts, STYLE)
