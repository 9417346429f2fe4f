"""Quality against bits, drawn for several models: `cordee eval A B … --plot FILE`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cordee.errors import BadRequest
from cordee.files import atomic_file

SUFFIXES = (".svg", ".png")
INCHES = (7.0, 4.5)
LABEL_OFFSET_POINTS = (6, 6)


@dataclass(frozen=True)
class Point:
    """A model: its bits per weight, perplexity, and (with an original) KL divergence."""

    name: str
    bits: float
    perplexity: float
    kl: float | None


def require_plotting(path: Path) -> None:
    """Say at once, and not after minutes of reading, that nothing could be drawn.

    Raises:
        BadRequest: another kind of file is wanted, or matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise BadRequest(f"{path} is to be a picture: name a file that ends in .svg or .png.", "plot")
    _pyplot()


def plot(points: Sequence[Point], path: Path) -> None:
    """Write a picture: KL divergence over bits if all points have it, else perplexity.

    Raises:
        StorageFailed: it cannot be written.
    """
    figure, axes = _pyplot().subplots(figsize=INCHES, layout="constrained")
    divergences = [point.kl for point in points if point.kl is not None]
    has_original = len(divergences) == len(points)
    values = divergences if has_original else [point.perplexity for point in points]
    axes.plot([point.bits for point in points], values, "o")
    for point, value in zip(points, values, strict=True):
        axes.annotate(point.name, (point.bits, value), xytext=LABEL_OFFSET_POINTS, textcoords="offset points")
    axes.set_xlabel("bits per weight, all tensors and scales counted")
    axes.set_ylabel("KL divergence from the original" if has_original else "perplexity")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))


def _pyplot() -> Any:
    """matplotlib's pyplot, with a canvas that needs no screen.

    Raises:
        BadRequest: it is not installed.
    """
    try:
        import_module("matplotlib").use("agg")
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise BadRequest(
            "--plot needs matplotlib, which is not installed: pip install 'cordee[plot]'.", "plot"
        ) from error
