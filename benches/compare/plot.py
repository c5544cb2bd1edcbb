"""The figure: a row for each contender, a panel for each measure, all on logarithmic scales."""

import html, math, os

NAMES, WIDTH, GAP = 250, 190, 22  # of the column of names, of a panel, and between two of them
TOP, ROW, BOTTOM = 58, 28, 44
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600 } .small { font-size: 10px; fill: #777 } .ours { font-weight: 600; fill: #b3410e }
.grid { stroke: #ddd } .line { stroke: #8a8a8a; stroke-width: 2 } .dot { fill: #6b6b6b; stroke: #6b6b6b }
.line.ours { stroke: #d9541e } .dot.ours { fill: #d9541e; stroke: #d9541e }
.open { fill-opacity: 0; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .small { fill: #999 } .ours { fill: #ff9a6b } .grid { stroke: #444 }
  .line { stroke: #8f8f8f } .dot { fill: #b5b5b5; stroke: #b5b5b5 }
  .line.ours { stroke: #ff8a55 } .dot.ours { fill: #ff8a55; stroke: #ff8a55 }
}
"""


class Panel:
    """Of each contender it has up to as many values as `points` has names, in that order; None is left out. The first
    that is there is written beside them."""

    def __init__(self, title, points, values):
        self.title, self.points, self.values = title, points, values
        every = [value for row in values.values() for value in row if value] or [1]
        self.low = math.floor(math.log10(min(every)))
        self.high = max(math.ceil(math.log10(max(every))), self.low + 1)

    def x(self, value):
        return WIDTH * (math.log10(value) - self.low) / (self.high - self.low)


def draw(path, names, panels, of):
    height = TOP + ROW * len(names) + BOTTOM
    width = NAMES + (WIDTH + GAP) * len(panels)
    parts = []
    for row, name in enumerate(names):
        parts.append(text(0, TOP + ROW * (row + 0.5) + 4, name, "ours" if is_ours(name) else ""))
    for column, panel in enumerate(panels):
        parts.append('<g transform="translate(%d 0)">' % (NAMES + (WIDTH + GAP) * column))
        parts += [*axis(panel, len(names)), *marks(panel, names), "</g>"]
    told = "Logarithmic scales; the number beside a line is its first point. %s" % html.escape(of)
    parts.append(text(0, height - 6, told, "small"))
    write(path, width, height, parts)


def write(path, width, height, parts, style=""):
    size = (width, height)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d">'
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("\n".join([head % (size + size), "<style>%s</style>" % (STYLE + style), *parts, "</svg>\n"]))


def is_ours(name):
    return name.startswith("codesandbox")


def text(x, y, content, classes="", anchor="start"):
    return '<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>' % (x, y, classes, anchor, html.escape(content))


def shape(index, count):
    """A point's radius and class: the first is small and full, the last big and open."""
    return (3.2 + 1.2 * index, "open" if index and index == count - 1 else "")


def axis(panel, rows):
    yield text(0, 16, panel.title, "title")
    x = 4
    for index, name in enumerate(panel.points):
        radius, filled = shape(index, len(panel.points))
        yield '<circle cx="%.1f" cy="32" r="%.1f" class="dot %s"/>' % (x, radius, filled)
        yield text(x + 9, 36, name, "small")
        x += 24 + 6 * len(name)
    bottom = TOP + ROW * rows
    for power in range(panel.low, panel.high + 1):
        x = panel.x(10.0**power)
        yield '<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" class="grid"/>' % (x, x, TOP - 6, bottom)
        yield text(x, bottom + 14, "%g" % 10.0**power, "small", "middle")


def marks(panel, names):
    for row, name in enumerate(names):
        y, ours = TOP + ROW * (row + 0.5), "ours" if is_ours(name) else ""
        points = [(panel.x(value), index) for index, value in enumerate(panel.values.get(name, [])) if value]
        if not points:
            yield text(0, y + 4, "–", "small")
            continue
        left, right = min(points)[0], max(points)[0]
        yield '<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" class="line %s"/>' % (left, right, y, y, ours)
        value = next(value for value in panel.values[name] if value)
        label = "%.0f" % value if value >= 100 else "%.1f" % value
        if right < WIDTH - 50:
            yield text(right + 10, y + 4, label, "small")
        else:
            yield text(left - 8, y + 4, label, "small", "end")
        for x, index in points:
            radius, filled = shape(index, len(panel.points))
            yield '<circle cx="%.1f" cy="%.1f" r="%.1f" class="dot %s %s"/>' % (x, y, radius, filled, ours)
