"""Charts: marks lie where their numbers are, nothing leaves the frame, and text cannot become markup."""

import re
from xml.etree.ElementTree import fromstring

import pytest

from ssmcompress.report import figures
from ssmcompress.report.figures import Axis, Point, Share

PLACE = re.compile(r"translate\(([-\d.]+) ([-\d.]+)\)")


def marks(svg):
    """(x, y) of each mark by the name in its title."""
    found = {}
    for path in fromstring(svg).iter("path"):
        if (title := path.find("title")) is not None:
            x, y = PLACE.fullmatch(path.attrib["transform"]).groups()
            found[title.text] = (float(x), float(y))
    return found


@pytest.mark.parametrize("values", [[1.7, 2.2], [0.0041], [0, 0], [-3, 12], [1e6, 4.2e6], [1.80001, 1.80002], [-0.2]])
@pytest.mark.parametrize("zero", [False, True])
def test_an_axis_holds_its_values_between_even_ticks(values, zero):
    axis = Axis.of(values, 0, 100, zero=zero)
    assert axis.low <= min(values) + 1e-12 and axis.high >= max(values) - 1e-12
    assert not zero or axis.low <= 0 <= axis.high
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps)) and 1 <= len(steps) <= 7
    assert len(set(axis.words())) == len(axis.ticks)
    assert axis.at(axis.low) == 0 and axis.at(axis.high) == 100


def test_a_tick_says_where_it_is():
    axis = Axis.of([0, 0.9], 0, 1, zero=True)
    told = [float(word) for word in axis.words()]
    assert told == pytest.approx(list(axis.ticks))


def test_points_lie_by_their_numbers_and_inside():
    points = [Point("a", 1, 2.4, 1.90, 1.85, 1.95), Point("b", 2, 2.4, 1.80, 1.75, 1.86), Point("d", 0, 3.7, 1.70)]
    svg = figures.scatter(points, "size", "bits", "described")
    a, b, d = marks(svg).values()
    assert a[1] < b[1] < d[1]
    assert d[0] > b[0] > a[0] and b[0] - a[0] >= 9  # of one size: side by side
    height = float(fromstring(svg).attrib["viewBox"].split()[3])
    assert all(0 < x < figures.WIDTH and 0 < y < height for x, y in (a, b, d))


def test_shares_have_their_interval_and_chance():
    groups = {"copy": [Share("a", 1, 0.5, 0.4, 0.6), Share("b", 2, 1.0, 0.9, 1.0)]}
    svg = figures.shares(groups, {"copy": 0.25}, "described")
    lines = {line.attrib["class"]: line.attrib for line in fromstring(svg).iter("line")}
    a, b = marks(svg).values()
    assert float(lines["whisker m1"]["x1"]) < a[0] < float(lines["whisker m1"]["x2"])
    scale = (b[0] - a[0]) / 0.5
    assert float(lines["chance"]["x1"]) == pytest.approx(a[0] - 0.25 * scale, abs=0.02)
    assert "chance" not in figures.shares(groups, {"copy": None}, "described")


@pytest.mark.parametrize("count", [1, 2, 24, 64])
def test_any_number_of_layers_fits(count):
    errors = {layer: 0.1 + layer / 100 for layer in range(count)}
    cells = {"in_proj": dict.fromkeys(range(count), 0.5), "x_proj": {0: 0.25}}
    for svg in (figures.lines([("a", 1, errors)], "described"), figures.grid(cells, "described")):
        ticks = [text for text in fromstring(svg).iter("text") if (text.text or "").isdecimal()]
        assert all(0 <= float(text.attrib["x"]) <= figures.WIDTH for text in ticks)
        assert sum(text.attrib["class"] == "tick middle" for text in ticks) <= 13


def test_words_are_not_markup():
    bad = '"><script>alert(1)</script>'
    svg = figures.scatter([Point(bad, 1, 1, 1), Point("b", 2, 2, 2)], bad, bad, bad)
    assert "<script" not in svg and fromstring(svg).attrib["aria-label"] == bad


def test_many_models_have_different_marks():
    assert len({figures.mark(number) for number in range(25)}) == 25
