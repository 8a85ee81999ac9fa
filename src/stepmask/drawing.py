"""Figures by matplotlib, which is optional, without its global state; and the colours of what a block does."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmask.extras import extra
from stepmask.files import write_whole
from stepmask.text import printable, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "compute": "#1f4e79",
    "blend": "#3f86c0",
    "reuse": "#f2c879",
    "forecast": "#e07b39",
    "dead": "#e6e9ee",
}
"""Of the kinds of a plan's cells."""

LONGEST, LARGEST = 400, 2000
"""Of a figure: inches of a side, and square inches, beyond which its pixels fill a machine's memory."""

INK = "#010203"
"""Stands for a page's own text colour while an inline drawing is made."""


def blank(width: float, height: float) -> "Figure":
    """A figure of a size in inches, for its methods to draw on; one that would be too large is smaller.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    width, height = min(width, LONGEST), min(height, LONGEST)
    smaller = min(1.0, (LARGEST / (width * height)) ** 0.5)
    figure: Figure = _matplotlib().figure.Figure(figsize=(smaller * width, smaller * height), layout="tight")
    return figure


def name_lines(axis: Any, names: Sequence[str], **options: Any) -> None:
    """A legend of the lines on an axis. Names are shown letter by letter: none is a formula, or hides its line.

    Args:
        axis: The axis.
        names: Of its lines, in the order in which they were drawn.
        **options: Of the legend.
    """
    legend = axis.legend(axis.get_lines(), [str(place) for place in range(len(names))], **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        literal(text, name)


def literal(text: Any, name: str) -> None:
    """Let a text of a figure say a name letter by letter."""
    text.set_parse_math(False)
    text.set_text(shortened(printable(name)))


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a figure in the format that its path ends in; PNG where it ends in none.

    Raises:
        UnwritablePath: The path cannot be written.
    """
    return write_whole(path, encoded(figure, Path(path).suffix.lstrip(".") or "png"))


def encoded(figure: "Figure", kind: str) -> bytes:
    """A figure as the content of a file: "png", "svg", "pdf"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight")
    return buffer.getvalue()


@contextmanager
def inked() -> Iterator[None]:
    """Within it figures are drawn for `inline`: everything that is not a colour of its own in `INK`."""
    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = {**dict.fromkeys(parts, INK), "svg.fonttype": "none", "svg.hashsalt": "stepmask"}
    with _matplotlib().rc_context(settings):
        yield


def inline(figure: "Figure") -> str:
    """A figure as SVG for the inside of a page, in the page's text colour. Make and draw it within `inked`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :].replace(INK, "currentColor")


def _matplotlib() -> Any:
    with extra("evaluate", "matplotlib", "pictures"):
        import matplotlib.figure
    return matplotlib
