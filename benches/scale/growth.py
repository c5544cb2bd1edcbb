"""How a cost grows: the slope of its curve where both scales are logarithmic. 1 is linear, 2 is quadratic."""

import math

LIMIT = 1.3  # above it a cost counts as more than linear; linear ones came out at up to 1.1 on a noisy machine
# Of runs that stream, the CPU time per byte depends on how many lines happen to travel together: streamed through Docker
# it was between 240 and 370 ms per MB from 1 to 15 MB, in no order, which alone makes slopes of up to 1.44.
RUN_LIMIT = 1.5


class Growth:
    """A cost at each size. What is below `least` counts as that, so that the noise of what is next to nothing has no
    slope."""

    def __init__(self, name, costs, least, limit=LIMIT):
        self.name, self.limit = name, limit
        self.slope = slope([(size, max(cost, least)) for size, cost in upper(costs)])

    def is_more_than_linear(self):
        return self.slope > self.limit


def upper(costs):
    """Those from a tenth of the largest size on, where what grows outweighs what does not."""
    largest = max(size for size, _ in costs)
    return [(size, cost) for size, cost in costs if size >= largest / 10]


def slope(points):
    """Of the line through them with the least squares."""
    points = [(math.log(size), math.log(cost)) for size, cost in points]
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)


def each_time(name, costs):
    """Of what is paid once for each: all of them pay the sum, so one that grows linearly would make that quadratic. One
    that is no more than at the first size has not grown."""
    first = costs[0][1]
    return Growth(name, [(size, size * max(cost, first)) for size, cost in costs], 0)


def beyond_first(name, costs):
    """Of what the size adds: the cost at the smallest size is that of any run. Less than a tenth of it is noise."""
    base = costs[0][1]
    return Growth(name, [(size, cost - base) for size, cost in costs[1:]], base / 10, RUN_LIMIT)


def tell(growths):
    """Whether all of them grow at most linearly."""
    print("\n%-58s slope" % "growth, as the slope in log-log from a tenth of the most on")
    for growth in growths:
        verdict = "  MORE THAN LINEAR" * growth.is_more_than_linear()
        print("%-58s %5.2f  <= %.1f%s" % (growth.name, growth.slope, growth.limit, verdict))
    return not any(growth.is_more_than_linear() for growth in growths)
