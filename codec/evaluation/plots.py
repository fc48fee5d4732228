"""Static rate-quality plots for READMEs and papers, by matplotlib: anchors dashed, learned codecs solid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calotype.errors import InputError
from calotype.evaluation.curves import Curve
from calotype.evaluation.metrics import METRICS

# Okabe and Ito's colours, distinguishable with any colour vision; ours first.
COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#B8A500", "#5D3FD3",
    "#2F4F4F", "#9BC53D", "#C3423F", "#5BC0BE",
)  # fmt: skip


def colours(curves: Sequence[Curve]) -> dict[str, str]:
    """Name -> colour: learned codecs take the first ones, so that they keep them whatever stands beside them."""
    ordered = sorted(curves, key=lambda curve: ("learned", "anchor", "published").index(curve.kind))
    return {curve.name: COLOURS[i % len(COLOURS)] for i, curve in enumerate(ordered)}


def label(curve: Curve) -> str:
    return f"{curve.name} (published)" if curve.kind == "published" else curve.name


def _styles(curve: Curve) -> dict[str, Any]:
    if curve.kind == "learned":
        return {"linestyle": "-", "linewidth": 2.2, "marker": "o", "markersize": 4.5, "zorder": 3}
    if curve.kind == "anchor":
        return {"linestyle": "--", "linewidth": 1.4, "marker": "s", "markersize": 3}
    return {"linestyle": (0, (1, 1.2)), "linewidth": 1.3, "marker": "x", "markersize": 3.5}


def plot_rate_quality(
    curves: Sequence[Curve],
    metrics: Sequence[str],
    path: Path,
    *,
    title: str,
    bpp_range: tuple[float, float] | None = None,
    dark: bool = False,
) -> None:
    """One panel a metric, two in a row, as PNG or SVG by the suffix of `path`; `bpp_range` is what is shown."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path.name}: plots are .png, .svg or .pdf")
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    shown = [m for m in metrics if any(curve.series(m) for curve in curves)]
    if not shown:
        raise InputError("there is nothing to plot: no curve has any of the metrics")
    colour = colours(curves)
    with plt.style.context("dark_background" if dark else "default"), plt.rc_context({"svg.hashsalt": "calotype"}):
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(6.2 * columns, 4.8 * rows), squeeze=False)
        axes = list(grid.flat)
        for spare in axes[len(shown) :]:
            spare.set_visible(False)
        for axis, metric in zip(axes, shown, strict=False):
            low, high = bpp_range or (0.0, float("inf"))
            for curve in sorted(curves, key=lambda c: ("published", "anchor", "learned").index(c.kind)):
                series = [(rate, quality) for rate, quality in curve.series(metric) if low <= rate <= high]
                if series:
                    rates, qualities = zip(*series, strict=True)
                    axis.plot(rates, qualities, color=colour[curve.name], label=label(curve), **_styles(curve))
            axis.set_xlabel("bits per pixel (whole file)")
            axis.set_ylabel(METRICS[metric].label)
            axis.grid(True, alpha=0.25)
            axis.set_title(METRICS[metric].label.split(" (")[0], fontsize=10)
        handles, labels = axes[0].get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: list(colour).index(labels[i].removesuffix(" (published)")))
        axes[len(shown) - 1].legend(
            [handles[i] for i in order], [labels[i] for i in order], fontsize=8, loc="lower right"
        )
        figure.suptitle(title, fontsize=11)
        figure.tight_layout()
        # Without a date the same run gives the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
