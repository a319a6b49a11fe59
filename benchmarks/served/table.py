"""Table: what was measured beside what must and should be reached."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def judged(value: float, must: float, aim: float, more_is_better: bool = False) -> str:
    sign = -1 if more_is_better else 1
    return "aim" if sign * value <= sign * aim else "must" if sign * value <= sign * must else "no"


def table(rows: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """What, must, aim, measured, reached; of the rows that there are."""
    out: list[tuple[str, str, str, str, str]] = []
    add = out.append
    if r := rows.get("start"):
        told = f"{r['median']:.2f} s (best {r['best']:.2f} s of {len(r['seconds'])})"
        add(("start to ready", "2 s", "1 s", told, judged(r["median"], 2, 1)))
    if r := rows.get("memory"):
        for name, what, must, aim in (
            ("own", "memory, MovieLens-1M with BERT", 300, 180),
            ("large", "memory, 1 million items × 64", 1000, 600),
        ):
            told = f"RSS {r[name]['rss']:.0f} MB, PSS {r[name]['pss']:.0f} MB, " \
                   f"{r[name]['anonymous']:.0f} MB of it not mapped from files"  # fmt: skip
            add((what, f"{must} MB", f"{aim} MB", told, judged(r[name]["rss"], must, aim)))
    if r := rows.get("one"):
        told = f"{r['p50']:.1f} / {r['p99']:.1f} ms"
        reached = worst(judged(r["p50"], 6, 2.5), judged(r["p99"], 15, 6))
        add(("one client: p50 / p99", "6 / 15 ms", "2.5 / 6 ms", told, reached))
    if r := rows.get("text"):
        told = f"{r['p50']:.1f} ms (p99 {r['p99']:.1f})"
        add(("one client, with profile text: p50", "12 ms", "5 ms", told, judged(r["p50"], 12, 5)))
    if r := rows.get("user"):
        told = f"{r['p50']:.1f} / {r['p99']:.1f} ms"
        add(("one client, by a known user's id: p50 / p99", "", "", told, ""))
    if r := rows.get("many"):
        told = f"{r['rate']:.0f}/s, {r['p99']:.0f} ms, {r['errors']}"
        reached = worst(
            judged(r["rate"], 250, 800, True), judged(r["p99"], 120, 40), judged(r["errors"], 0, 0)
        )
        what = f"16 clients, {r['seconds']:.0f} s: requests/s, p99, errors"
        add((what, "250, 120 ms, 0", "800, 40 ms, 0", told, reached))
    if r := rows.get("plain"):
        out += _against(r)
    if r := rows.get("growth"):
        told = f"{r['times']:.2f} × ({r['small']:.1f} -> {r['large']:.1f} ms)"
        add(("4,000 to 1 million items: p50 grows by", "3 ×", "1.5 ×", told,
             judged(r["times"], 3, 1.5)))  # fmt: skip
    if r := rows.get("events"):
        told = f"{r['missed']} of {r['events']} missed; {r['histories_right']} of " \
               f"{r['histories']} histories as acknowledged"  # fmt: skip
        missed = r["missed"] + r["histories"] - r["histories_right"]
        add(("event acknowledged to reflected", "next request", "next request", told,
             judged(missed, 0, 0)))  # fmt: skip
    if r := rows.get("soak"):
        told = f"{100 * r['growth']:+.1f} % ({r['first_mb']:.0f} -> {r['last_mb']:.0f} MB), " \
               f"{r['errors']} of {r['requests']:,}"  # fmt: skip
        reached = worst(judged(r["growth"], 0.05, 0.01), judged(r["errors"], 0, 0))
        what = f"soak of {r['seconds'] / 60:.0f} min at {r['asked_rate']:.0f}/s: memory, errors"
        add((what, "5 %, 0", "1 %, 0", told, reached))
    return out


def _against(r: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    ours, other = r["ours"], r["plain"]
    faster, sooner = ours["rate"] / other["rate"], other["p99"] / ours["p99"]
    reached = worst(judged(faster, 3, 8, True), judged(sooner, 3, 8, True))
    told = f"{faster:.1f} ×, 1/{sooner:.1f} ({ours['rate']:.0f} and {other['rate']:.0f}/s; p99 " \
           f"{ours['p99']:.0f} and {other['p99']:.0f} ms)"  # fmt: skip
    beside = [
        ("one client, p50", ours["one_p50"], other["one_p50"], "ms"),
        ("processor time a request", ours["server_cpu_ms"], other["server_cpu_ms"], "ms"),
        ("memory, RSS", ours["memory"]["rss"], other["memory"]["rss"], "MB"),
        ("start to ready", ours["started"], other["started"], "s"),
    ]
    lines = [
        (f"… {what}", "", "", f"{a:.1f} and {b:.1f} {unit} ({b / a:.1f} ×)", "")
        for what, a, b, unit in beside
    ]
    lines.append(("… the same items", "", "", f"{100 * r['same']:.0f} %", ""))
    return [
        ("against the plain way: requests/s, p99", "3 ×, 1/3", "8 ×, 1/8", told, reached),
        *lines,
    ]


def worst(*reached: str) -> str:
    return max(reached, key=("aim", "must", "no").index)


def report(found: dict[str, Any]) -> str:
    """All of it as Markdown."""
    rows = found["rows"]
    out = [found["machine"], "", *_lines(("", "must", "aim", "measured", "reached"), table(rows))]
    others = (f"{name} {100 * row['others']:.0f} %" for name, row in rows.items())
    out += ["", f"Of the processor time, others took meanwhile: {', '.join(others)}."]
    if len({row["code"] for row in rows.values()}) > 1:
        out += ["", "**These rows were not all measured with the same code; use --again.**"]
    out += _stages(rows)
    if "profile" in rows:
        out += _profile(rows["profile"])
    return "\n".join(out)


def _stages(rows: dict[str, Any]) -> list[str]:
    named = {"one": "one client", "many": "16 clients"}
    some = {name: rows[name] for name in named if name in rows}
    if not some:
        return []
    stages = [stage for stage, told in next(iter(some.values()))["stages"].items() if told["count"]]
    out = ["", "By stage, ms of a request (`GET /v1/stats`):", ""]
    head = ["stage", *(f"{named[name]}, {part}" for name in some for part in ("p50", "p99"))]
    times = [
        [stage, *(str(row["stages"][stage][p]) for row in some.values() for p in ("p50", "p99"))]
        for stage in stages
    ]
    out += [*_lines(head, times), ""]
    for name, row in some.items():
        load = 1e3 * row["cpu"] / row["requests"]
        out.append(
            f"{named[name].capitalize()}: {row['server_cpu_ms']:.2f} ms of processor time a request"
            f" in the server, {load:.3f} ms in the load generator. "
        )
    return out


_OUTSIDE = ("(threading", "(<frozen", "(asyncio", "tfrec/cli", "__main__", "comp>", "server.py")


def _profile(profile: dict[str, Any], most: int = 16) -> list[str]:
    """The dearest functions, by themselves and with what they call."""
    out: list[str] = []
    for name, what in (("one", "One client"), ("many", "16 clients")):
        found = profile[name]
        threads = ", ".join(
            f"{thread} {100 * share:.0f} %"
            for thread, share in found["threads"].items()
            if share >= 0.01
        )
        own, whole = (
            [
                (f"`{function}`", f"{100 * share:.1f} %")
                for function, share in found[kind].items()
                if kind == "own" or not any(part in function for part in _OUTSIDE)
            ][:most]
            for kind in ("own", "whole")
        )
        out += [
            "",
            f"{what}, share of the samples in which something was done; threads: {threads}.",
        ]
        pairs = [(*a, *b) for a, b in itertools.zip_longest(own, whole, fillvalue=("", ""))]
        out += ["", *_lines(("itself", "", "with what it calls", ""), pairs)]
    return out


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]
