"""Charts of the report in one SVG file: a row a panel, under its title and the marks of its lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from ssmcompress.report import figures

WIDTH, HEAD, HIGH = 380, 26, 300  # of a chart, of the line above it, and of both
TITLE, NAME = 110, 150  # how far its words reach


@dataclass(frozen=True)
class Panel:
    """A title, the names of its lines in the order of their marks, and its charts from left to right."""

    title: str
    names: Sequence[str]
    charts: Sequence[str]


def file(panels: Sequence[Panel]) -> str:
    """The panels one below the other, with the styles that they need."""
    width = WIDTH * max(len(panel.charts) for panel in panels)
    size = {"width": f"{width}", "height": f"{HIGH * len(panels)}"}
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "figure"} | size)
    SubElement(svg, "style").text = (files("ssmcompress.report") / "figures.css").read_text(encoding="utf-8")
    for i, panel in enumerate(panels):
        top = HIGH * i
        SubElement(svg, "text", {"class": "name", "x": "14", "y": f"{top + 18}"}).text = panel.title
        for mark, name in enumerate(panel.names, 1):
            left = TITLE + NAME * (mark - 1)
            _place(svg, figures.mark(mark), left, top + 7, 14, 14)
            SubElement(svg, "text", {"x": f"{left + 18}", "y": f"{top + 18}"}).text = name
        for j, chart in enumerate(panel.charts):
            _place(svg, chart, WIDTH * j, top + HEAD, WIDTH, HIGH - HEAD - 14)
    return tostring(svg, encoding="unicode") + "\n"


def _place(svg: Element, drawn: str, x: int, y: int, width: int, height: int) -> None:
    inner = fromstring(drawn)
    for name, value in {"x": x, "y": y, "width": width, "height": height}.items():
        inner.set(name, str(value))
    svg.append(inner)
