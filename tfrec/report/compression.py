"""Compression: what smaller models cost and win, as a page, as a file, and as text.

``compress.json`` is the whole report; the page and the text are drawn from it alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tfrec.artifact import write_json, write_text
from tfrec.report.drawing import GRID, INK, WIDTH, Tree, panels, svgs
from tfrec.report.parts import document, figure, findings, note, pairs_table, section, table, tile
from tfrec.report.proof import HITS, KNOWN, NEW

_FILE = "compress.json"
_CHOSEN, _OFFERED, _WORSE = "#2fa37a", "#2f6fed", "#9aa3b2"
_CAPTION = (
    "Bars are 95% intervals of the paired bootstrap over users. Green: chosen; gray: worse than "
    "another model on every axis."
)
_NAMES = {KNOWN: "NDCG@10", NEW: "NDCG@20, new items", HITS: "HR@10"}
_KEPT = {
    "kept": "kept, NDCG@10",
    "hits": "kept, HR@10",
    "new": "kept, NDCG@20 of new items",
    "neighbours": "neighbours kept",
    "cosine": "cosine, mean / min",
}
_COST = {
    "text": "text encoder, MB",
    "bundle": "bundle, MB",
    "one": "1 text",
    "many": "32 texts",
    "query": "1 query",
    "queries": "32 queries",
    "rank": "1 ranked",
    "ranks": "32 ranked",
    "request": "a request",
    "memory": "memory",
}
_IN_TERMINAL = {
    "kept": "kept",
    "new": "kept, new",
    "neighbours": "neighbours",
    "text": "text MB",
    "bundle": "bundle MB",
    "one": "1 text",
    "many": "32 texts",
    "request": "request",
    "memory": "memory",
}


def write(tree: Tree, folder: Path) -> None:
    """Writes ``compress.json`` and ``report.html``.

    Args:
      tree: Plain finite values, as :mod:`tfrec.stages.compress` gathers them.
      folder: Where to.
    """
    write_json(folder / _FILE, tree)
    write_text(folder / "report.html", page(read(folder)))


def read(folder: Path) -> dict[str, Any]:
    """What :func:`write` was given."""
    tree: dict[str, Any] = json.loads((folder / _FILE).read_text("utf-8"))
    return tree


def measured(tree: Tree) -> dict[str, Any]:
    """The chosen model in a few numbers."""
    model = _chosen(tree)
    return {
        "loss": round(model["loss"], 6),
        "bundle_bytes": model["sizes"]["bundle"],
        "text_bytes": model["sizes"]["text"],
        **model["times"],
    }


def text(tree: Tree) -> str:
    """The table and the choice, for the terminal."""
    head = ["", *_IN_TERMINAL.values()]
    rows = [
        [_title(model), *(_cells(model)[name] for name in _IN_TERMINAL)] for model in tree["models"]
    ]
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([*lines, "", *_findings(tree)])


def why_not(tree: Tree) -> str:
    """That no model keeps within the budget, and which comes nearest, in one line."""
    model, misses = _chosen(tree), tree["misses"]
    asked, found = _bounds(tree["budget"]), _bounds(_costs(model))
    missed = ", ".join(f"{found[n]} where {asked[n]} is asked" for n in misses)
    return (
        f"no model keeps within the budget; the nearest is {model['key']}, with {missed}; ask for "
        "less, or see what else there is in compress/report/report.html"
    )


def _costs(model: Tree) -> dict[str, Any]:
    times = model["times"]
    return {
        "loss": model["loss"],
        "size": model["sizes"]["bundle"],
        "latency": times.get("one_ms", times["request_ms"]),
    }


def _bounds(told: Mapping[str, Any]) -> dict[str, str]:
    words: dict[str, Callable[[Any], str]] = {
        "loss": lambda value: f"a loss of {value:.2%}",
        "size": lambda value: f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:g} kB",
        "latency": lambda value: f"{value:.2f} ms" if value >= 0.1 else f"{1e3 * value:.3g} µs",
    }
    return {name: words[name](value) for name, value in told.items() if value is not None}


def _chosen(tree: Tree) -> Tree:
    found: Tree = next(model for model in tree["models"] if model["key"] == tree["chosen"])
    return found


def _title(model: Tree) -> str:
    return str(model["key"])


def _cells(model: Tree) -> dict[str, str]:
    """What each of the columns says."""
    kept, sizes, times = model["kept"], model["sizes"], model["times"]
    timed = ("one", "many", "query", "queries", "rank", "ranks", "request")
    return {
        "kept": _percent(kept.get(KNOWN)),
        "hits": _percent(kept.get(HITS)),
        "new": _percent(kept.get(NEW)),
        "neighbours": f"{model['neighbours']:.1%}" if "neighbours" in model else "–",
        "text": f"{sizes['text'] / 1e6:.1f}" if sizes["text"] else "–",
        "bundle": f"{sizes['bundle'] / 1e6:.1f}",
        **{name: _time(times.get(f"{name}_ms")) for name in timed},
        "memory": f"{times['memory_mb']:.0f} MB",
        "cosine": f"{model['cosine']:.4f} / {model['cosine_min']:.4f}"
        if "cosine" in model
        else "–",
    }


def _percent(share: Tree | None) -> str:
    return f"{share['mean']:.1%}" if share and share["mean"] is not None else "–"


def _time(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms"


def _findings(tree: Tree) -> list[str]:
    model, base = _chosen(tree), tree["models"][0]
    budget = _bounds(tree["budget"])
    asked = f"within {' and '.join(budget.values())}" if budget else "of all"
    costs = _bounds(_costs(model))
    lines = []
    if not tree["misses"]:
        how = f"tfrec export {_path(tree, model)} --to BUNDLE"
        how += "" if model["settings"]["int8"] else " --no-int8"
        how += "" if tree["budget"]["size"] is None else " --no-saved-models"
        best = "the one that loses least" if tree["budget"]["loss"] is None else "the smallest"
        lines.append(f"{model['key']} is {best} {asked}: {', '.join(costs.values())}; `{how}`")
    before, now = base["times"], model["times"]
    if model is not base and "one_ms" in before:
        smaller = base["sizes"]["bundle"] / model["sizes"]["bundle"]
        lines.append(
            f"beside the model as it was trained, the bundle is {smaller:.1f} times smaller, and "
            f"reads a text {before['one_ms'] / now['one_ms']:.1f} times faster, 32 texts "
            f"{before['many_ms'] / now['many_ms']:.1f} times"
        )
    for worse in tree["models"]:
        if worse["worse_than"]:
            lines.append(
                f"{worse['key']} is not offered: it loses more, is larger and is slower than "
                f"{worse['worse_than']}"
            )
    return lines


def _path(tree: Tree, model: Tree) -> str:
    return str(Path(tree["folder"], model["path"]))


def page(tree: Tree) -> str:
    """The whole page as HTML text."""
    drawn = svgs({"trade": _trade}, tree)
    body = [
        _header(tree),
        section(
            "What is lost, and what is won",
            findings(_findings(tree) + ([why_not(tree)] if tree["misses"] else []))
            + figure(drawn, "trade", _CAPTION),
        ),
        section("Every model", _tables(tree) + note(_how(tree))),
        section("Zeros", _zeros(tree)),
    ]
    return document(f"{tree['name']}: compression", body)


def _header(tree: Tree) -> str:
    model, base = _chosen(tree), tree["models"][0]
    tiles = [
        tile("chosen", model["key"], "nearest" if tree["misses"] else "within the budget"),
        tile("kept", _percent(model["kept"].get(KNOWN)), "of NDCG@10 on test events"),
        tile(
            "bundle",
            f"{model['sizes']['bundle'] / 1e6:.1f} MB",
            f"was {base['sizes']['bundle'] / 1e6:.1f} MB",
        ),
    ]
    if NEW in model["kept"]:
        tiles.insert(
            2, tile("kept, new items", _percent(model["kept"][NEW]), "of NDCG@20, by text alone")
        )
    if "one_ms" in model["times"]:
        tiles.append(
            tile(
                "one text", _time(model["times"]["one_ms"]), f"was {_time(base['times']['one_ms'])}"
            )
        )
    return (
        f"<header><p class=over>tfrec {escape(tree['tfrec_version'])}, compression</p>"
        f"<h1>{escape(tree['name'])}</h1>"
        f"<p class=over>{escape(tree['created'][:16].replace('T', ' '))} UTC, seed {tree['seed']}, "
        f"{escape(tree['machine'])}</p><div class=tiles>{''.join(tiles)}</div></header>"
    )


def _how(tree: Tree) -> str:
    new = (
        "the test items, none of whose events are known"
        if tree["cold"]
        else "all items, each taken for new"
    )
    return (
        f"Of {tree['users']:,} users with test events, against {tree['models'][0]['key']}, all "
        "exported and run by LiteRT in this command. New items: retrieval among "
        f"{new}, by their texts as the small model reads them. Cosine and neighbours: "
        f"{tree['judged']:,} texts of the catalog that no small model learned from. Times are "
        "medians in a process of its own with all cores, of one and of 32: texts, query vectors, "
        "and users whose candidates the ranker reads; memory is the most it had."
    )


def _tables(tree: Tree) -> str:
    """What each model keeps, and what it costs."""
    kept: list[tuple[list[str], str]] = []
    cost: list[tuple[list[str], str]] = []
    for model in tree["models"]:
        cells = {name: escape(cell) for name, cell in _cells(model).items()}
        for column, name in (("kept", KNOWN), ("hits", HITS), ("new", NEW)):
            share = model["kept"].get(name)
            if share and "low" in share:
                cells[column] += f"<small>{share['low']:.1%} to {share['high']:.1%}</small>"
            if name in model["metrics"]:
                cells[column] += f"<small>{model['metrics'][name]['mean']:.4f}</small>"
        for part in ("text", "bundle"):
            cells[part] += f"<small>gzip {model['sizes'][f'{part}_gzip'] / 1e6:.1f}</small>"
        name = f'<i class=dot style="background:{_colour(tree, model)}"></i>{escape(_title(model))}'
        style = "ours" if model["key"] == tree["chosen"] else ""
        for rows, columns in ((kept, _KEPT), (cost, _COST)):
            rows.append(([name, *(cells[column] for column in columns)], style))
    return table(["", *_KEPT.values()], kept) + table(["", *_COST.values()], cost)


def _zeros(tree: Tree) -> str:
    parts = []
    for model in tree["models"]:
        if not model["zeros"]:
            continue
        shares = pairs_table((name, f"{share:.1%}") for name, share in model["zeros"].items())
        parts.append(
            f"<details><summary>{escape(model['key'])}: {len(model['zeros'])} kernels, "
            f"{model['zeros_of_all']:.1%} of their weights</summary>{shares}</details>"
        )
    return "".join(parts)


def _colour(tree: Tree, model: Tree) -> str:
    if model["key"] == tree["chosen"]:
        return _CHOSEN
    return _WORSE if model["worse_than"] else _OFFERED


def _trade(tree: Tree) -> Figure:
    figure, axes = panels(2, WIDTH, 4.2)
    reads = "one_ms" in tree["models"][0]["times"]
    time = f"milliseconds {'to read one text' if reads else 'of a request'}"
    sides: Sequence[tuple[str, Callable[[Tree], float]]] = (
        ("bundle, MB", lambda model: model["sizes"]["bundle"] / 1e6),
        (time, lambda model: float(_costs(model)["latency"])),
    )
    kept = tree["models"][0]["kept"]
    metric = NEW if kept.get(NEW, {}).get("mean") else KNOWN
    shown = [model for model in tree["models"] if model["kept"][metric]["mean"] is not None]
    least = min(model["kept"][metric]["mean"] for model in shown)
    for axis, (title, across) in zip(axes, sides, strict=True):
        for place, model in enumerate(sorted(shown, key=across)):
            share, x = model["kept"][metric], across(model)
            if "low" in share:
                axis.plot([x, x], [share["low"], share["high"]], color=INK, lw=1, alpha=0.5)
            axis.scatter(x, share["mean"], s=70, color=_colour(tree, model), zorder=3)
            axis.annotate(
                model["key"],
                (x, share["mean"]),
                xytext=(7, -12 if place % 2 else 6),  # neighbours' names stand apart
                textcoords="offset points",
                fontsize=8,
            )
        loss = tree["budget"]["loss"]
        if loss is not None and 1 - loss > least - 0.2:
            axis.axhline(1 - loss, color=GRID, lw=1, ls="--")
        axis.set_xlabel(title)
        axis.margins(0.2)
        axis.set_xlim(0, 1.3 * max(map(across, shown)))  # room for names
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[0].set_title(f"kept of {_NAMES[metric]}, by size")
    axes[1].set_title(f"kept of {_NAMES[metric]}, by time")
    return figure
