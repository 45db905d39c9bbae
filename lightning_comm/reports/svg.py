"""Figures as SVG for pages in one file. They need matplotlib, which the package can do without."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cannot_draw() -> str | None:
    """Return why no figure can be drawn, or ``None`` if they can be."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed, and `pip install matplotlib` gets it"
    except Exception as error:  # a broken installation raises whatever it likes
        return f"matplotlib cannot be imported ({type(error).__name__}: {error})"
    return None


def new_figure(height: float) -> tuple["Figure", "Axes"]:
    """Return a figure as wide as a page and its axes."""
    # Imported here: the package works without matplotlib. `Figure` itself, since pyplot looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height + 0.5), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def legend(axes: "Axes", columns: int = 3) -> None:
    """Put the legend above the axes."""
    axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def to_svg(figure: "Figure") -> bytes:
    """Return the source of a figure."""
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    return out.getvalue()
