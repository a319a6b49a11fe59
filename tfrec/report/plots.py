"""Plots: the report's figures as SVG that takes the page's colours, light or dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tfrec.report.drawing import GRID, INK, WIDTH, Tree, panels, svgs
from tfrec.report.text import in_order, label, value_of

COLOURS = {
    "ranking": "#2f6fed",
    "retrieval": "#62b5e5",
    "ease": "#e8912d",
    "als": "#2fa37a",
    "item_knn": "#a26bdc",
    "popular": "#9aa3b2",
}
"""One colour for each model, in every figure, that is legible on white and on near-black."""

FEW = 10
"""Segments of fewer users or targets are not drawn; report.json has them."""

_SEGMENT_TITLES = {"history": "length of history", "popularity": "popularity of the target"}


def figures(tree: Tree) -> dict[str, str]:
    """Every figure that the report has data for: name -> inline SVG."""
    makers: dict[str, Callable[[Tree], Figure | None]] = {
        "models": _models,
        "by_k": _by_k,
        "trade": _trade,
        "learning": _learning,
        "history": _history,
        "target_popularity": _target_popularity,
        "exposure": _exposure,
        "by_events": _by_events,
        "calibration": _calibration,
    }
    return svgs(makers, tree)


def _models(tree: Tree) -> Figure:
    names = [f"{m}@{tree['k']}" for m in ("ndcg", "hr")]
    models = tree["models"][::-1]
    figure, axes = panels(2, WIDTH, 0.8 + 0.42 * len(models))
    for axis, metric in zip(axes, names, strict=True):
        axis.grid(visible=False, axis="y")
        for place, model in enumerate(models):
            estimate = model["metrics"][metric]
            mean = estimate["mean"]
            low, high = estimate.get("low", mean), estimate.get("high", mean)
            axis.barh(place, mean, color=_colour(model), height=0.66)
            if high > low:
                axis.plot([low, high], [place, place], color=INK, lw=1.4, solid_capstyle="butt")
            axis.annotate(
                f"{mean:.4f}",
                (max(high, mean), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axis.set_yticks(range(len(models)), [m["name"] for m in models])
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.22)
        axis.set_xlim(left=0)
        axis.set_title(label(metric))
    axes[1].set_yticklabels([])
    return figure


def _by_k(tree: Tree) -> Figure | None:
    if len(tree["ks"]) < 2:
        return None
    figure, axes = panels(2, WIDTH, 3.4)
    for axis, name in zip(axes, ("ndcg", "recall"), strict=True):
        for model in tree["models"]:
            values = [model["metrics"][f"{name}@{k}"]["mean"] for k in tree["ks"]]
            axis.plot(tree["ks"], values, "o-", ms=4, color=_colour(model), label=model["name"])
        axis.set_xscale("log")
        axis.set_xticks(tree["ks"], [str(k) for k in tree["ks"]])
        axis.minorticks_off()
        axis.set_xlabel("k, length of the list")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{label(name)} by k")
    axes[0].legend(fontsize=9)
    return figure


def _trade(tree: Tree) -> Figure:
    k = tree["k"]
    figure, axes = panels(2, WIDTH, 3.2)
    sides = [
        (f"coverage@{k}", "Accuracy and coverage", "more of the catalog"),
        (f"tail_share@{k}", "Accuracy and the long tail", "less of the popular"),
    ]
    for axis, (across, title, meaning) in zip(axes, sides, strict=True):
        for model in tree["models"]:
            x, y = value_of(model, across), value_of(model, f"ndcg@{k}")
            axis.scatter(x, y, s=80, color=_colour(model), label=model["name"], zorder=3)
        axis.set_xlabel(f"{label(across)}, {meaning} to the right")
        axis.set_ylabel(label(f"ndcg@{k}"))
        axis.margins(0.15)
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
        axis.set_ylim(bottom=0)
        axis.set_title(title)
    axes[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _learning(tree: Tree) -> Figure | None:
    curves = [(one["task"], one["history"]) for one in tree["learning"] if one["history"]]
    if not curves:
        return None
    figure, axes = panels(len(curves), WIDTH, 3.2)
    for axis, (task, history) in zip(axes, curves, strict=True):
        loss, ndcg = _points(history, "loss"), _points(history, "ndcg@10")
        axis.plot(*loss, color=GRID)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("epoch")
        axis.set_ylabel("training loss (grey)")
        axis.set_title(f"Training of {task}")
        if ndcg[0]:
            best = max(ndcg[1])
            epoch = ndcg[0][ndcg[1].index(best)]
            axis.set_title(f"Training of {task}: best {best:.4f} after epoch {epoch:g}")
            _validation(axis.twinx(), *ndcg, COLOURS.get(task, INK))
    return figure


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if row.get(key) is not None]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def _validation(axis: Any, epochs: Sequence[float], values: Sequence[float], colour: str) -> None:
    axis.plot(epochs, values, "o-", ms=4, color=colour)
    axis.set_ylabel("validation NDCG@10", color=colour)
    axis.spines["right"].set_visible(True)


def _history(tree: Tree) -> Figure:
    return _segments(tree, "history", "events in the user's history", "users")


def _target_popularity(tree: Tree) -> Figure:
    across = "tenth of the items that the target is in, 10 the most popular"
    return _segments(tree, "popularity", across, "targets")


def _segments(tree: Tree, which: str, across: str, what: str) -> Figure:
    metric = f"ndcg@{tree['k']}"
    figure, axes = panels(1, WIDTH, 3.4)
    rows = tree["models"][0]["segments"][which]
    large = [row["count"] >= FEW for row in rows]
    rows = list(compress(rows, large))
    for model in tree["models"]:
        values = [row[metric] for row in compress(model["segments"][which], large)]
        axes[0].plot(values, "o-", ms=4, color=_colour(model), label=model["name"])
    names = [f"{row['segment']}\n{row['count']:,}" for row in rows]
    axes[0].set_xticks(range(len(rows)), names)
    axes[0].set_xlabel(f"{across}; below, how many {what}")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title(f"{label(metric)} by {_SEGMENT_TITLES[which]}")
    axes[0].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


_LINES = {
    "both": ("profile and history", COLOURS["ranking"], "o-"),
    "history": ("history only", COLOURS["ease"], "o-"),
    "profile": ("profile only", COLOURS["als"], "--"),
}


def _by_events(tree: Tree) -> Figure | None:
    told = tree["by_events"]
    if not told:
        return None
    figure, axes = panels(2, WIDTH, 3.4)
    across = range(len(told["events"]))
    for axis, name in zip(axes, ("ndcg", "hr"), strict=True):
        metric = f"{name}@{told['k']}"
        for line, values in told["lines"].items():
            called, colour, style = _LINES[line]
            axis.plot(across, values[metric], style, ms=4, color=colour, label=called)
        axis.set_xticks(list(across), [str(count) for count in told["events"]])
        axis.set_xlabel("first events of a user that are known")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{label(metric)} by number of events")
    axes[0].legend(fontsize=9)
    return figure


def _exposure(tree: Tree) -> Figure:
    figure, axes = panels(1, WIDTH, 3.4)
    tenths = range(1, 11)
    axes[0].bar(
        tenths, tree["popularity"]["history"], color=GRID, alpha=0.35, label="events in the data"
    )
    axes[0].plot(
        tenths, tree["popularity"]["targets"], "_", ms=22, color=INK, label="held-out events"
    )
    for model in tree["models"]:
        axes[0].plot(
            tenths, model["exposure"], "o-", ms=4, color=_colour(model), label=model["name"]
        )
    axes[0].set_xticks(list(tenths))
    axes[0].set_xlabel("tenth of the items by popularity, 10 the most popular")
    axes[0].set_ylabel("share")
    axes[0].set_title(f"What is recommended (first {tree['k']}) and what is in the data")
    axes[0].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _calibration(tree: Tree) -> Figure | None:
    tasks = [(task, told) for task, told in in_order(tree["predictions"]) if "auc" in told]
    if not tasks:
        return None
    figure, axes = panels(max(len(tasks), 2), WIDTH, 3.6)
    for unused in axes[len(tasks) :]:
        unused.set_axis_off()
    for axis, (task, told) in zip(axes, tasks, strict=False):
        table: Sequence[Mapping[str, float]] = told["reliability"]
        axis.plot([0, 1], [0, 1], ls=":", color=GRID)
        axis.plot(
            [row["predicted"] for row in table],
            [row["observed"] for row in table],
            "-",
            color=COLOURS["ranking"],
        )
        most = max(row["count"] for row in table)
        axis.scatter(
            [row["predicted"] for row in table],
            [row["observed"] for row in table],
            s=[12 + 120 * row["count"] / most for row in table],
            color=COLOURS["ranking"],
        )
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_xlabel("predicted probability")
        axis.set_ylabel("observed share")
        axis.set_title(f"Calibration of {task}")
    return figure


def _colour(model: Mapping[str, Any]) -> str:
    return COLOURS.get(model["key"], GRID)
