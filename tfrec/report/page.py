"""Page: report.html, drawn from what report.json holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tfrec.metrics import RANKING
from tfrec.report.parts import (
    document,
    figure,
    findings,
    note,
    pairs,
    pairs_table,
    section,
    table,
    tile,
)
from tfrec.report.plots import COLOURS, FEW, figures
from tfrec.report.text import MEANING, in_order, interval_text, label, number, value_of

Tree = Mapping[str, Any]

_SUMMARY = (
    "ndcg", "hr", "mrr", "coverage", "novelty", "diversity", "gini", "popularity", "tail_share"
)  # fmt: skip


def page(tree: Tree) -> str:
    """The whole page as HTML text."""
    drawn = figures(tree)
    body = [
        _header(tree),
        section(
            "The models", findings(tree["findings"]) + _summary(tree) + figure(drawn, "models")
        ),
        section("Accuracy at every k", figure(drawn, "by_k") + _every_k(tree)),
        section("Beyond accuracy", _beyond(drawn)),
        section("For whom, and for which items", _for_whom(tree, drawn)),
        section("Cold start", _by_events(tree, drawn) + _cold_items(tree)),
        section("Predictions of the ranker", _predictions(tree, drawn)),
        section("Examples", _examples(tree)),
        section("Training", _training(tree, drawn)),
        section("The data", _data(tree)),
        section("How it was measured", _how(tree)),
    ]
    return document(f"{tree['name']}: evaluation", body)


def _header(tree: Tree) -> str:
    k, models = tree["k"], tree["models"]
    # The last one is the whole chain. The best on the test events would be a choice by them.
    top = models[-1]
    protocol = tree["protocol"]
    tiles = [
        tile(label(f"{name}@{k}"), number(name, value_of(top, f"{name}@{k}")), about)
        for name, about in (
            ("ndcg", top["name"]),
            ("hr", "users with a hit"),
            ("coverage", "of the catalog shown"),
        )
    ]
    against = [c for c in tree["comparisons"] if c["role"] == "baseline" and c["ratio"]]
    if against:
        gain = f"{against[0]['ratio'] - 1:+.0%}"
        tiles.insert(1, tile("against the best baseline", gain, against[0]["to"]))
    tiles.append(
        tile("users", f"{protocol['users']:,}", f"{protocol['targets']:,} held-out events")
    )
    return (
        f"<header><p class=over>tfrec {escape(tree['tfrec_version'])}, evaluation</p>"
        f"<h1>{escape(tree['name'])}</h1>"
        f"<p class=over>{escape(tree['created'][:16].replace('T', ' '))} UTC, "
        f"split {escape(protocol['split'])}, seed {tree['seed']}</p>"
        f"<div class=tiles>{''.join(tiles)}</div></header>"
    )


def _summary(tree: Tree) -> str:
    columns = [f"{name}@{tree['k']}" for name in _SUMMARY]
    return _model_table(tree, columns) + _glossary(columns)


def _model_table(tree: Tree, columns: Sequence[str]) -> str:
    best = {
        metric: max(value_of(model, metric) for model in tree["models"])
        for metric in columns
        if metric in tree["models"][0]["metrics"]
    }
    rows = []
    for model in tree["models"]:
        cells = []
        for metric in columns:
            value = value_of(model, metric)
            text = escape(number(metric, value))
            if value == best.get(metric):
                text = f"<b>{text}</b>"
            cells.append(f"{text}<small>{interval_text(model, metric)}</small>")
        rows.append(([_model_name(model), *cells], _css(model)))
    return table(["", *(label(m) for m in columns)], rows)


def _css(model: Tree) -> str:
    return "ours" if model["ours"] else ""


def _model_name(model: Tree) -> str:
    colour = COLOURS.get(model["key"], "gray")
    return f'<i class=dot style="background:{colour}"></i>{escape(model["name"])}'


def _glossary(columns: Sequence[str]) -> str:
    names = dict.fromkeys(label(m).partition("@")[0] for m in columns)
    items = "".join(f"<dt>{n}<dd>{escape(MEANING[n])}" for n in names if n in MEANING)
    return f"<details><summary>What the columns mean</summary><dl>{items}</dl></details>"


def _every_k(tree: Tree) -> str:
    out = []
    for k in tree["ks"]:
        columns = [f"{name}@{k}" for name in RANKING]
        out.append(f"<h3>k = {k}</h3>" + _model_table(tree, [*columns, f"coverage@{k}"]))
    meaning = _glossary(RANKING)
    return f"<details><summary>Every metric at every k</summary>{''.join(out)}{meaning}</details>"


def _beyond(drawn: Mapping[str, str]) -> str:
    return figure(drawn, "trade") + figure(
        drawn,
        "exposure",
        "Grey bars: where the events of the data are. A line above them at the right recommends "
        "the popular more than people choose it.",
    )


def _for_whom(tree: Tree, drawn: Mapping[str, str]) -> str:
    return (
        figure(drawn, "history")
        + figure(drawn, "target_popularity", f"Segments of fewer than {FEW} are not drawn.")
        + _by_decile(tree)
    )


def _by_decile(tree: Tree) -> str:
    """HR and NDCG of each model by the popularity of the target, in figures."""
    k = tree["k"]
    out = ""
    for metric in (f"ndcg@{k}", f"hr@{k}"):
        rows = []
        for model in tree["models"]:
            of = {row["segment"]: row for row in model["segments"]["popularity"]}
            values = [of[str(d)][metric] if str(d) in of else None for d in range(1, 11)]
            rows.append(([_model_name(model), *map(_maybe, values)], _css(model)))
        of = {row["segment"]: row["count"] for row in tree["models"][0]["segments"]["popularity"]}
        rows.append((["targets", *(f"{of.get(str(d), 0):,}" for d in range(1, 11))], ""))
        head = [label(metric), *map(str, range(1, 11))]
        out += table(head, rows)
    title = "Metrics by tenth of the items that the target is in, 10 the most popular"
    return f"<details><summary>{title}</summary>{out}</details>"


def _by_events(tree: Tree, drawn: Mapping[str, str]) -> str:
    told = tree["by_events"]
    if not told:
        return ""
    return figure(
        drawn,
        "by_events",
        f"The same {told['users']:,} users and {told['targets']:,} held-out events at every point: "
        "the events of a user after his 20th that are held out. Of his first 20 the model is "
        "given as many as the axis says. Without any event, words answer, else popularity.",
    )


def _cold_items(tree: Tree) -> str:
    told = tree["cold_items"]
    if not told:
        return ""
    names = [f"recall@{told['k']}", f"ndcg@{told['k']}"]
    rows = [
        (
            [_model_name(model)]
            + [_maybe(model.get(where, {}).get(m)) for where in ("among", "all") for m in names],
            "",
        )
        for model in told["models"]
    ]
    head = ["", *(f"{label(m)}, {w}" for w in ("cold items only", "whole catalog") for m in names)]
    return table(head, rows) + note(
        f"The {told['items']:,} items that all events were held out of, averaged over the "
        f"{told['users']:,} users who have such an event. Among these items alone chance would "
        f"give Recall@{told['k']} {told['chance']:.4f}; the baselines cannot tell them apart."
    )


def _predictions(tree: Tree, drawn: Mapping[str, str]) -> str:
    told = in_order(tree["predictions"])
    if not told:
        return ""
    classes = [
        (
            [
                escape(task),
                f"{t['events']:,}",
                f"{t['positives']:,}",
                _maybe(t["auc"]),
                _maybe(t["log_loss"]),
                _maybe(t["log_loss_of_the_rate"]),
                _maybe(t["calibration_error"]),
            ],
            "",
        )
        for task, t in told
        if "auc" in t
    ]
    head = ["", "events", "positive", "AUC", "log-loss", "log-loss of the mean rate", "ECE"]
    out = table(head, classes, "narrow") if classes else ""
    for task, t in told:
        if "rmse" in t:
            cells = [escape(task), f"{t['events']:,}", _maybe(t["rmse"]), _maybe(t["mae"])]
            head = ["", "events", "RMSE", "MAE", "RMSE of always the mean"]
            out += table(head, [([*cells, _maybe(t["rmse_of_the_mean"])], "")], "narrow")
    return out + note(tree["predictions_note"]) + figure(drawn, "calibration")


def _examples(tree: Tree) -> str:
    return "".join(_example(one) for one in tree["examples"])


def _example(one: Tree) -> str:
    history = "".join(f"<li>{_item(i)}" for i in one["history"])
    more = one["history_length"] - len(one["history"])
    before = f"<p class=note>the last of {one['history_length']}</p>" if more > 0 else ""
    lists = "".join(
        f"<div><h4>{escape(shown['name'])}</h4><ol>"
        + "".join(f"<li{' class=hit' if i['hit'] else ''}>{_item(i)}" for i in shown["items"])
        + "</ol></div>"
        for shown in one["lists"]
    )
    truth = ", ".join(_item(i) for i in one["targets"])
    return (
        f"<div class=example><h3>User {escape(one['user'])}</h3>"
        f"<p>What came next: <b>{truth}</b></p><div class=columns>"
        f"<div><h4>History, newest first</h4>{before}<ul>{history}</ul></div>{lists}</div></div>"
    )


def _item(item: Tree) -> str:
    return f'<span title="{escape(item["id"])}">{escape(item["title"])}</span>'


def _training(tree: Tree, drawn: Mapping[str, str]) -> str:
    return figure(drawn, "learning") + _settings(tree)


def _settings(tree: Tree) -> str:
    rows = []
    for model in tree["models"]:
        tried = "; ".join(
            f"{pairs({k: v for k, v in p.items() if k != 'ndcg@10'})}: {p['ndcg@10']:.4f}"
            for p in model["tried"]
        )
        if model["settings"]:
            cells = [_model_name(model), escape(pairs(model["settings"])), escape(tried)]
            rows.append((cells, ""))
    head = ["", "settings", "tried on the validation events, NDCG@10"]
    return table(head, rows, "prose") if rows else ""


def _data(tree: Tree) -> str:
    data = tree["data"]
    split = data.get("split", {})
    events = [("interactions read", data.get("rows"))]
    events += [(f"dropped: {why}", n) for why, n in data.get("dropped", {}).items()]
    events += [("interactions kept", data.get("interactions"))]
    events += [(f"for {part}", split.get(part)) for part in ("train", "valid", "test")]
    events += [(f"of type {name}", n) for name, n in data.get("events", {}).items()]
    events += [("first day", data.get("first")), ("last day", data.get("last"))]
    who = [
        (what + kind, data.get(what + key))
        for what in ("users", "items")
        for kind, key in (("", ""), (" without events", "_without_events"))
    ]
    who.append(("items not in the items file", data.get("unknown_items") or None))
    for what in ("user", "item"):
        told = data.get(f"{what}_attributes") or {}
        who += [(f"{what} attribute {name}", kind) for name, kind in told.items()]
    return f"<div class=columns>{pairs_table(events)}{pairs_table(who)}</div>"


def _how(tree: Tree) -> str:
    protocol = "".join(f"<li>{escape(line)}" for line in tree["protocol"]["notes"])
    seconds = pairs_table((t["what"], f"{t['seconds']:,.1f} s") for t in tree["seconds"])
    config = escape(json.dumps(tree["config"], indent=2, ensure_ascii=False))
    return (
        f"<ul>{protocol}</ul><details><summary>Time it took</summary>{seconds}</details>"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )


def _maybe(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
