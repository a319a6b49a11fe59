"""Text: the report in words and in a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "hr": "HR",
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "map": "MAP",
    "coverage": "Coverage",
    "novelty": "Novelty",
    "diversity": "Diversity",
    "gini": "Gini",
    "popularity": "Popularity",
    "tail_share": "Long tail",
}

MEANING = {
    "HR": "share of users with a hit among the first k",
    "Recall": "share of the held-out items that are among the first k",
    "Precision": "share of the first k that are hits",
    "F1": "harmonic mean of precision and recall, of each user",
    "NDCG": "hits weighted by their place: 1 at the top, 1 / log2(place + 1) further down",
    "MRR": "1 / place of the first hit",
    "MAP": "mean precision at the places of the hits",
    "Coverage": "distinct items recommended to anyone, over the items that have an event",
    "Novelty": "mean self-information of what is recommended, in bits; the rarer the more",
    "Diversity": "1 - mean cosine between the items of a list",
    "Gini": "0: all items are recommended alike; 1: all recommendations are of one item",
    "Popularity": "mean number of users who had met the recommended items before",
    "Long tail": "share of recommendations outside the most popular fifth of the items",
}

_SMALL = ("ndcg", "hr", "mrr", "coverage", "novelty", "tail_share")


def label(metric: str) -> str:
    """``ndcg@10`` as people write it: NDCG@10."""
    name, at, k = metric.partition("@")
    return LABELS.get(name, name) + at + k


def value_of(model: Mapping[str, Any], metric: str) -> float:
    """A model's value of a metric, whichever group it is in."""
    if metric in model["metrics"]:
        return float(model["metrics"][metric]["mean"])
    return float(model["beyond"][metric])


def in_order(predictions: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The predicted tasks in the order in which they are always shown."""
    return [
        (t, predictions[t]) for t in ("click", "like", "conversion", "rating") if t in predictions
    ]


def number(metric: str, value: float) -> str:
    """A value as the metric is usually written."""
    name = metric.partition("@")[0]
    if name in ("coverage", "diversity", "gini", "tail_share"):
        return f"{value:.3f}"
    if name == "novelty":
        return f"{value:.2f}"
    return f"{value:,.0f}" if name == "popularity" and value >= 10 else f"{value:.4f}"


def text_examples(tree: Mapping[str, Any]) -> str:
    """Some users with titles: what they did, what came next, what our last model recommends.

    Args:
      tree: What report.json holds.
    """
    return "\n\n".join(_example(user) for user in tree["examples"])


def _example(user: Mapping[str, Any]) -> str:
    recommended = user["lists"][0]
    lines = [f"user {user['user']}, {user['history_length']:,} events known, the newest first"]
    lines += [f"      {item['title']}" for item in user["history"][:5]]
    lines.append(f"  recommended by {recommended['name']}; * is what came next")
    lines += [
        f"  {rank:>2}{'*' if item['hit'] else ' '} {item['title']}"
        for rank, item in enumerate(recommended["items"], 1)
    ]
    return "\n".join(lines)


def text_table(tree: Mapping[str, Any]) -> str:
    """The models, one a line, with the 95% interval of NDCG; then what follows from them.

    Args:
      tree: What report.json holds.
    """
    k = tree["k"]
    columns = [f"{name}@{k}" for name in _SMALL]
    best = {m: max(value_of(row, m) for row in tree["models"]) for m in columns[:3]}
    head = ["", *(label(m) for m in columns)]
    lines = [head, *(_line(row, columns, best) for row in tree["models"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    out.insert(1, "-" * max(len(line) for line in out))
    return "\n".join([*out, "", "* best", *tree["findings"]])


def _line(row: Mapping[str, Any], columns: Sequence[str], best: Mapping[str, float]) -> list[str]:
    cells = [row["name"]]
    for metric in columns:
        value = value_of(row, metric)
        star = "*" if metric in best and value == best[metric] else ""
        cells.append(star + number(metric, value) + interval_text(row, metric))
    return cells


def interval_text(row: Mapping[str, Any], metric: str) -> str:
    """`` [low, high]`` of the NDCG of a model where it was measured, else nothing."""
    estimate = row["metrics"].get(metric, {})
    if not metric.startswith("ndcg") or "low" not in estimate:
        return ""
    return f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def findings(tree: Mapping[str, Any]) -> list[str]:
    """What the comparisons say, in sentences that do not flatter.

    Args:
      tree: Its ``comparisons`` (with their ``role``) and ``skipped`` are read.
    """
    says = {"baseline": _against_baseline, "retrieval": _against_retrieval}
    return [says[c["role"]](c) for c in tree["comparisons"]] + [
        f"{name} was left out: {why}." for name, why in tree["skipped"].items()
    ]


def protocol_notes(told: Mapping[str, Any]) -> list[str]:
    """How it was measured, in sentences.

    Args:
      told: What report.json holds under ``protocol``.
    """
    refitted = (
        "baselines and our models are fitted anew on training and validation events."
        if told["refit"]
        else "baselines are fitted anew on training and validation events, our models are not "
        "(adapt.refit = false)."
    )
    seen = (
        f"these items are not recommended again ({told['targets_in_history']:,} held-out events "
        "are of such items and cannot be found)."
        if told["exclude_history"]
        else "these items may be recommended again."
    )
    notes = [
        _SPLITS[told["split"]],
        f"Every user with a held-out event counts: {told['users']:,} users, {told['targets']:,} "
        f"events. All {told['items']:,} items are ranked; no negatives are sampled.",
        f"Models read the training and validation events of a user, and {seen}",
        f"Settings are chosen on the validation events alone; then {refitted}",
        f"Coverage is of the {told['items_with_events']:,} items that have an event. Diversity is "
        f"measured on {told['diversity_of']}. Popularity counts users before the held-out events; "
        "the long tail is all but the most popular fifth of the items.",
    ]
    if told["request_time"]:
        notes.append(
            "The time of the held-out event is an input of our models (request_time): a running "
            "service knows it, and most published figures do without."
        )
    if told["bootstrap"]:
        notes.append(
            f"Intervals: 95%, percentiles of {told['bootstrap']:,} resamples of the users; "
            "differences are paired. They do not cover the randomness of training."
        )
    return notes


_SPLITS = {
    "leave_one_out": "Leave-one-out: the last event of each user is held out for the test, the one "
    "before for validation. Order is by time, and by the order of the file on equal times.",
    "time": "By time: the latest events of all users are held out for the test, those before for "
    "validation.",
    "item_cold": "Cold items: every event of some random items is held out.",
    "user_cold": "Cold users: every event of some random users is held out, so that nothing is "
    "known of them but their attributes.",
    "none": "The data names its own held-out events.",
}


def _against_baseline(c: Mapping[str, Any]) -> str:
    side = "above" if c["difference"] > 0 else "below" if c["difference"] < 0 else "equal to"
    share = "" if c["ratio"] is None or not c["difference"] else f"{_percent(c['ratio'])} "
    return (
        f"{c['of']} is {share}{side} the best baseline, {c['to']}, in {label(c['metric'])}: "
        f"{_difference(c)}."
    )


def _against_retrieval(c: Mapping[str, Any]) -> str:
    verdict = "improves on" if c["difference"] > 0 else "does NOT improve on"
    return f"The ranker {verdict} retrieval alone in {label(c['metric'])}: {_difference(c)}."


def _percent(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%}" if abs(ratio - 1) >= 0.01 else f"{abs(ratio - 1):.1%}"


def _difference(c: Mapping[str, Any]) -> str:
    text = f"{c['difference']:+.4f}"
    if "low" not in c:
        return text
    doubt = "" if c["sure"] else ", which may be chance"
    return f"{text}, 95% interval [{c['low']:+.4f}, {c['high']:+.4f}]{doubt}"
