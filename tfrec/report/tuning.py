"""Tuning: what a search for settings found, as a page, as files, and as text for the terminal.

``trials.json`` is the whole search; the page and the text are drawn from it alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tfrec.artifact import write_json, write_text
from tfrec.report.drawing import GRID, INK, WIDTH, Tree, panels, svgs
from tfrec.report.parts import (
    document,
    figure,
    findings,
    note,
    pairs,
    pairs_table,
    plain,
    section,
    table,
    tile,
)

_BEST, _USUAL, _FAILED = "#2fa37a", "#2f6fed", "#e8912d"
_GOAL = "validation NDCG@10"
_ACROSS = 4  # panels in a row
_TRIALS = "trials.json"


def write(tree: Tree, folder: Path) -> None:
    """Writes ``best.toml``, ``trials.json``, ``trials.csv`` and ``report.html``.

    Args:
      tree: Plain finite values, as :mod:`tfrec.tune` gathers them; one trial at least is complete.
      folder: Where to.
    """
    write_json(folder / _TRIALS, tree)
    tree = read(folder)
    write_text(folder / "best.toml", _toml(tree))
    write_text(folder / "trials.csv", _csv(tree))
    write_text(folder / "report.html", page(tree))


def read(folder: Path) -> dict[str, Any]:
    """What :func:`write` was given."""
    tree: dict[str, Any] = json.loads((folder / _TRIALS).read_text("utf-8"))
    return tree


def measured(tree: Tree) -> dict[str, Any]:
    """The search in a few numbers."""
    best, untuned = _best(tree)["value"], _untuned(tree)["value"]
    return {
        "trials": len(tree["trials"]),
        **{state: len(_of(tree, state)) for state in ("complete", "pruned", "failed")},
        "best_trial": tree["best"],
        "validation": best,
        "validation_untuned": untuned,
    }


def line(tree: Tree, number: int, wanted: int) -> str:
    """One trial in one line, as it has ended."""
    trial = next(t for t in tree["trials"] if t["number"] == number)
    ending = {
        "complete": lambda: f"{trial['value']:.4f}",
        "pruned": lambda: f"ended early after {trial['epochs']} epochs, {trial['reached']:.4f}",
        "failed": lambda: f"failed ({trial['reason']})",
    }[trial["state"]]()
    settings = _settings(tree, trial) if number else "the configuration as it is"
    best = f"; best {_best(tree)['value']:.4f}, trial {tree['best']}" if tree["best"] else ""
    return (
        f"[{len(tree['trials'])} of {wanted}] trial {number}: {ending} "
        f"in {_time(trial['seconds'])}{best}; {settings}"
    )


def text(tree: Tree, folder: Path) -> str:
    """What the search found, for the terminal."""
    best, untuned = _best(tree), _untuned(tree)
    rows = [("best", best), ("untuned", untuned)] if tree["best"] else [("untuned", untuned)]
    lines = [f"{tree['task']}, {_counts(tree)}, {_time(_seconds(tree))}"]
    lines += [f"  {what:<8} trial {t['number']:<4} {_GOAL} {t['value']:.4f}" for what, t in rows]
    if tree["best"]:
        changed = [key for key in best["values"] if best["values"][key] != tree["base"][key]]
        width = max((len(key) for key in changed), default=0)
        lines += [
            f"  {key:<{width}} = {_shown(best['values'][key])} (was {_shown(tree['base'][key])})"
            for key in changed
        ]
    return "\n".join([*lines, *_findings(tree), f"tfrec run {folder / 'best.toml'}"])


def page(tree: Tree) -> str:
    """The whole page as HTML text."""
    drawn = svgs(_makers(tree), tree)
    body = [
        _header(tree),
        section("What was found", findings(_findings(tree)) + _changes(tree)),
        section(
            "The search",
            figure(drawn, "search", _SEARCH_CAPTION)
            + figure(drawn, "curves", "Grey: the other trials; dotted: ended early."),
        ),
        section(
            "Each setting against the goal",
            figure(drawn, "settings", "Each dot is a trial; grey: ended early. Settings vary all "
                   "at once, so that a trend here may be another setting's.")
            + figure(drawn, "importance", _IMPORTANCE_CAPTION),
        ),
        section("The trials", _trials(tree)),
        section("What failed", _failures(tree)),
        section("How it was searched", _how(tree)),
    ]  # fmt: skip
    return document(f"{tree['name']}: tuning of {tree['task']}", body)


_SEARCH_CAPTION = (
    "Dots: trials. Rings: trials ended early, at the best validation they had reached. Crosses: "
    "trials that failed. The line is the best so far, the dashed one the untuned configuration."
)

_IMPORTANCE_CAPTION = (
    "How much a setting alone tells the better trials from all: PED-ANOVA (Watanabe, Bansal and "
    "Hutter, 2023, arXiv:2304.10255) as Optuna computes it. Rough with few trials."
)


def _header(tree: Tree) -> str:
    best, untuned = _best(tree), _untuned(tree)
    tiles = [
        tile(f"best {_GOAL}", f"{best['value']:.4f}", f"trial {best['number']}"),
        tile("untuned", f"{untuned['value']:.4f}", "trial 0, the configuration as it is"),
        tile("against untuned", _gain(tree), "on validation, and so optimistic"),
        tile("trials", f"{len(tree['trials'])}", _states(tree)),
        tile("time", _time(_seconds(tree)), "of all trials"),
    ]
    return (
        f"<header><p class=over>tfrec {escape(tree['tfrec_version'])}, tuning of "
        f"{escape(tree['task'])}</p><h1>{escape(tree['name'])}</h1>"
        f"<p class=over>{escape(tree['created'][:16].replace('T', ' '))} UTC, seed "
        f"{tree['seed']}</p><div class=tiles>{''.join(tiles)}</div></header>"
    )


def _findings(tree: Tree) -> list[str]:
    best, untuned = _best(tree), _untuned(tree)
    if not tree["best"]:
        found = ["No trial is better than the configuration as it is, trial 0."]
    else:
        found = [
            f"Trial {best['number']} is the best: {best['value']:.4f} against "
            f"{untuned['value']:.4f} of the configuration as it is, {_gain(tree)}.",
            "These are values of the validation events that chose the best of "
            f"{len(tree['trials'])} trials, and so too high; the test events were not looked at. "
            "An evaluation with best.toml measures what is left of the gain.",
        ]
    if tree["epochs"] < tree["epochs_configured"]:
        found.append(
            f"Every trial, trial 0 too, has trained for at most {tree['epochs']} epochs, and the "
            f"configuration says {tree['epochs_configured']}: short trainings favour settings that "
            "learn fast, and a gain here may not be one after the whole training."
        )
    return [*found, *(["Some trials failed; see below why."] if _of(tree, "failed") else [])]


def _changes(tree: Tree) -> str:
    best = _best(tree)["values"]
    rows = [
        ([escape(key), _strong(_shown(best[key]), best[key] != was), escape(_shown(was))], "")
        for key, was in tree["base"].items()
    ]
    return table(["", "best", "untuned"], rows, "narrow") + (
        "<details><summary>best.toml</summary>"
        f"<pre>{escape(_toml(tree))}</pre></details>"
    )  # fmt: skip


def _strong(value: str, strong: bool) -> str:
    return f"<b>{escape(value)}</b>" if strong else escape(value)


def _trials(tree: Tree) -> str:
    places = {"complete": 0, "pruned": 1, "failed": 2}
    ordered = sorted(
        tree["trials"],
        key=lambda t: (places[t["state"]], -(t["value"] or t["reached"] or 0.0), t["number"]),
    )
    rows = []
    for trial in ordered:
        value = trial["value"] if trial["value"] is not None else trial["reached"]
        cells = [
            str(trial["number"]) + (" (untuned)" if trial["number"] == 0 else ""),
            "ended early" if trial["state"] == "pruned" else trial["state"],
            "–" if value is None else f"{value:.4f}",
            str(trial["epochs"]),
            _time(trial["seconds"]),
            *(escape(_shown(value)) for value in trial["values"].values()),
        ]
        rows.append((cells, "ours" if trial["number"] == tree["best"] else ""))
    names = [_short(tree, key) for key in tree["base"]]
    return table(["trial", "", "NDCG@10", "epochs", "time", *names], rows) + note(
        "The best first. Of a trial that was ended early, the best validation it had reached."
    )


def _failures(tree: Tree) -> str:
    rows = [
        ([str(t["number"]), escape(t["reason"]), escape(_settings(tree, t))], "")
        for t in _of(tree, "failed")
    ]
    return table(["trial", "reason", "settings"], rows, "prose") if rows else ""


def _how(tree: Tree) -> str:
    told = {
        "goal": f"{_GOAL} of {'the whole chain' if tree['task'] == 'ranking' else 'retrieval'}",
        "sampler": f"TPE of Optuna {tree['optuna_version']}",
        "ends trials early": "no" if tree["pruner"] == "none" else tree["pruner"],
        "most epochs of a trial": tree["epochs"],
    }
    space = [(key, _dimension(one)) for key, one in tree["space"].items()]
    return f"<div class=columns>{pairs_table(told.items())}{pairs_table(space)}</div>"


def _dimension(told: Any) -> str:
    if isinstance(told, list):
        return ", ".join(plain(value) for value in told)
    step = f", in steps of {plain(told['step'])}" if told.get("step") else ""
    log = ", logarithmic" if told.get("log") else ""
    return f"{plain(told['low'])} to {plain(told['high'])}{step}{log}"


# --- figures ---


def _makers(tree: Tree) -> dict[str, Callable[[Tree], Figure | None]]:
    return {
        "search": _search,
        "curves": _curves,
        "settings": _each_setting,
        "importance": _importance,
    }


def _search(tree: Tree) -> Figure:
    drawn, (axis,) = panels(1, WIDTH, 3.4)
    best: list[float] = []
    for trial in tree["trials"]:
        best.append(max([*best[-1:], *([trial["value"]] if trial["state"] == "complete" else [])]))
    numbers = [trial["number"] for trial in tree["trials"]]
    axis.axhline(_untuned(tree)["value"], ls="--", lw=1, color=INK)
    axis.step(numbers, best, where="post", color=_BEST, lw=1.6)
    _dots(axis, tree, numbers)
    failed = [trial["number"] for trial in _of(tree, "failed")]
    axis.plot(
        failed, [0.03] * len(failed), "x", color=_FAILED, transform=axis.get_xaxis_transform()
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.12)
    axis.set_xlabel("trial")
    axis.set_ylabel(_GOAL)
    axis.set_title(f"Best so far: {_best(tree)['value']:.4f}, trial {tree['best']}")
    return drawn


def _dots(axis: Any, tree: Tree, places: Sequence[float]) -> None:
    """Trials by their value; the best in its own colour, those ended early as rings."""
    for place, trial in zip(places, tree["trials"], strict=True):
        whole, best = trial["state"] == "complete", trial["number"] == tree["best"]
        value = trial["value"] if whole else trial["reached"]
        if trial["state"] == "failed" or value is None:
            continue
        colour = _BEST if best else _USUAL if whole else GRID
        filling = colour if whole else "none"
        axis.plot(place, value, "o", ms=7 if best else 5, color=colour, mfc=filling, zorder=3)


def _curves(tree: Tree) -> Figure | None:
    if not any(len(trial["curve"]) > 1 for trial in tree["trials"]):
        return None
    drawn, (axis,) = panels(1, WIDTH, 3.4)
    for trial in tree["trials"]:
        if trial["curve"]:
            epochs, values = zip(*trial["curve"], strict=True)
            mark = "" if len(epochs) > 1 else "o"
            axis.plot(epochs, values, marker=mark, ms=4, **_line_of(trial, tree["best"]))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel(_GOAL if tree["task"] == "retrieval" else f"{_GOAL} of click")
    axis.set_title("The trainings")
    axis.legend(fontsize=9)
    return drawn


def _line_of(trial: Tree, best: int) -> dict[str, Any]:
    if trial["number"] == best:
        name = f"trial {best}, best" if best else "trial 0, untuned and best"
        return {"color": _BEST, "lw": 2.0, "zorder": 4, "label": name}
    if trial["number"] == 0:
        return {"color": INK, "ls": "--", "lw": 1.4, "zorder": 3, "label": "trial 0, untuned"}
    return {"color": GRID, "ls": ":" if trial["state"] == "pruned" else "-", "lw": 1.0}


def _each_setting(tree: Tree) -> Figure:
    keys = list(tree["base"])
    across = min(len(keys), _ACROSS)
    rows = -(-len(keys) // across)
    drawn, axes = panels(across, WIDTH, 0.3 + 1.95 * rows, rows)
    for axis, key in zip(axes, keys, strict=False):
        told = tree["space"][key]
        if isinstance(told, list):
            choices = [*told, *([] if tree["base"][key] in told else [tree["base"][key]])]
            axis.set_xticks(range(len(choices)), [plain(choice) for choice in choices])
            axis.set_xlim(-0.5, len(choices) - 0.5)
            _dots(axis, tree, [choices.index(t["values"][key]) for t in tree["trials"]])
        else:
            _range_axis(axis, told, tree["base"][key])
            _dots(axis, tree, [t["values"][key] for t in tree["trials"]])
        axis.set_title(_short(tree, key), fontsize=10)
    for number, axis in enumerate(axes):
        if number >= len(keys):
            axis.set_axis_off()
        elif number % across:
            axis.tick_params(labelleft=False)
        else:
            axis.set_ylabel("NDCG@10")
    return drawn


def _range_axis(axis: Any, told: Tree, base: float) -> None:
    """The whole range across, with few labels that do not touch each other."""
    low, high = min(told["low"], base), max(told["high"], base)
    room = 0.05
    if told.get("log"):
        axis.set_xscale("log")
        ticks = [lead * 10.0**power for power in range(-12, 13) for lead in (1, 3)]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(low * (low / high) ** room, high * (high / low) ** room)
    else:
        whole = all(isinstance(end, int) for end in (low, high))
        axis.xaxis.set_major_locator(MaxNLocator(integer=whole, nbins=5))
        axis.set_xlim(low - room * (high - low), high + room * (high - low))


def _importance(tree: Tree) -> Figure | None:
    if not tree["importance"]:
        return None
    told = sorted(tree["importance"].items(), key=lambda pair: pair[1])
    drawn, (axis,) = panels(1, WIDTH, 0.8 + 0.32 * len(told))
    axis.grid(visible=False, axis="y")
    axis.barh([_short(tree, key) for key, _ in told], [share for _, share in told], color=_USUAL)
    for place, (_, share) in enumerate(told):
        axis.annotate(
            f"{share:.0%}", (share, place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.1)
    axis.set_xticks([])
    axis.set_title("Importance of each setting")
    return drawn


# --- pieces ---


def _toml(tree: Tree) -> str:
    return (
        f"# The best of {len(tree['trials'])} trials of {tree['task']}: trial {tree['best']}, "
        f"{_GOAL} {_best(tree)['value']:.4f}\n"
        f"# (untuned: {_untuned(tree)['value']:.4f}). Paths are as they were given.\n"
        f"{tree['toml']}"
    )


def _csv(tree: Tree) -> str:
    stream = io.StringIO()
    known = ("number", "state", "value", "reached", "epochs", "seconds", "weights", "reason")
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow([*known, *tree["base"]])
    for trial in tree["trials"]:
        rows.writerow([*(trial[name] for name in known), *trial["values"].values()])
    return stream.getvalue()


def _best(tree: Tree) -> Mapping[str, Any]:
    found: Mapping[str, Any] = tree["trials"][_place(tree, tree["best"])]
    return found


def _untuned(tree: Tree) -> Mapping[str, Any]:
    found: Mapping[str, Any] = tree["trials"][_place(tree, 0)]
    return found


def _place(tree: Tree, number: int) -> int:
    return [trial["number"] for trial in tree["trials"]].index(number)


def _of(tree: Tree, state: str) -> Sequence[Mapping[str, Any]]:
    return [trial for trial in tree["trials"] if trial["state"] == state]


def _counts(tree: Tree) -> str:
    return f"{len(tree['trials'])} trials: {_states(tree)}"


def _states(tree: Tree) -> str:
    names = {"complete": "complete", "pruned": "ended early", "failed": "failed"}
    counts = {what: len(_of(tree, state)) for state, what in names.items()}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _gain(tree: Tree) -> str:
    untuned = _untuned(tree)["value"]
    return f"{_best(tree)['value'] / untuned - 1:+.1%}" if untuned else "from nothing"


def _seconds(tree: Tree) -> float:
    return sum(trial["seconds"] or 0.0 for trial in tree["trials"])


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _shown(value: Any) -> str:
    """A value of a setting, to as many places as matter; trials.json has them all."""
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def _settings(tree: Tree, trial: Mapping[str, Any]) -> str:
    return pairs({_short(tree, key): _shown(value) for key, value in trial["values"].items()})


def _short(tree: Tree, key: str) -> str:
    return key.removeprefix("adapt.").removeprefix(f"{tree['task']}.")
