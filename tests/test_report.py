"""The report: one page that loads nothing, escapes everything, and says what the numbers say."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tfrec import metrics, report
from tfrec.data.interactions import TEST, TRAIN, Interactions
from tfrec.report import measures
from tfrec.report.measures import Round, classification, compare, measure, regression
from tfrec.report.text import findings, number, protocol_notes

KS = [1, 2, 10]


def _interactions(rows, num_users):
    """Rows of (user, item, split)."""
    user, item, split = (np.array(column) for column in zip(*rows, strict=True))
    n = len(rows)
    return Interactions(
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        timestamp=np.arange(n, dtype=np.int64),
        event=np.zeros(n, np.int8),
        rating=np.full(n, np.nan, np.float32),
        weight=np.ones(n, np.float32),
        split=split.astype(np.int8),
        num_users=num_users,
    )


@pytest.fixture(scope="module")
def around():
    """Three users of four, items 1 to 5; user 2 holds nothing out."""
    events = _interactions(
        [
            *((0, 1, TRAIN), (0, 2, TRAIN), (0, 3, TEST)),
            *((1, 1, TRAIN), (1, 4, TEST), (1, 3, TEST)),
            (2, 1, TRAIN),
            (3, 2, TEST),
        ],
        num_users=4,
    )
    features = np.zeros((6, 0), np.float32)
    return Round.of(events.part(TRAIN), events.part(TEST), features, seed=1)


@pytest.fixture(scope="module")
def rows(around):
    good = np.array([[3, 4, 5], [4, 3, 5], [2, 1, 3]], np.int32)
    bad = np.array([[5, 4, 3], [5, 2, 0], [1, 5, 4]], np.int32)
    return [
        measure("ease", "EASE <&>", bad, around, KS, 200, 1),
        measure("ranking", "two-tower + ranker", good, around, KS, 200, 1),
    ]


@pytest.fixture(scope="module")
def tree(rows):
    for row, ours in zip(rows, (False, True), strict=True):
        row.tree.update(ours=ours, settings={"regularization": 200.0} if not ours else {}, tried=[])
    rows[0].tree["tried"] = [{"regularization": 200.0, "ndcg@10": 0.5}]
    told = {
        "split": "leave_one_out",
        "users": 3,
        "targets": 4,
        "targets_in_history": 0,
        "items": 5,
        "items_with_events": 4,
        "exclude_history": True,
        "refit": True,
        "request_time": False,
        "diversity_of": "item attributes",
        "bootstrap": 200,
    }
    item = {"id": "9", "title": "<script>alert(1)</script>"}
    made = {
        "name": "a <b>name</b>",
        "created": "2026-01-02T03:04:05+00:00",
        "tfrec_version": "1.2.3",
        "seed": 1,
        "k": 10,
        "ks": KS,
        "protocol": told | {"notes": protocol_notes(told)},
        "data": {
            "rows": 1234,
            "interactions": 1200,
            "dropped": {"duplicates": 34},
            "split": {"train": 1100, "valid": 50, "test": 50},
            "users": 4,
            "items": 5,
            "item_attributes": {"genre": "categorical, 3 values"},
        },
        "models": [row.tree for row in rows],
        "skipped": {"ALS": "it was too much"},
        "comparisons": [{"role": "baseline", **compare(rows[1], rows[0], "ndcg@10")}],
        "predictions": {
            "click": classification(np.array([0.2, 0.7, 0.9]), np.array([False, False, True])),
            "rating": regression(np.array([3.0, 4.0]), np.array([4.0, 4.0]), 3.5),
        },
        "predictions_note": "a note",
        "popularity": {"history": [0.1] * 10, "targets": [0.1] * 10},
        "by_events": {
            "users": 3,
            "targets": 4,
            "k": 10,
            "events": [0, 1, 2],
            "lines": {
                line: {m: [0.1, 0.2, 0.3] for m in ("ndcg@10", "hr@10", "recall@10")}
                for line in ("both", "history", "profile")
            },
        },
        "cold_items": {
            "k": 20,
            "items": 5,
            "users": 3,
            "chance": 1.0,
            "models": [
                {"key": "ease", "name": "EASE", "all": {"recall@20": 0.25, "ndcg@20": 0.125}},
                {
                    "key": "ranking",
                    "name": "two-tower + ranker",
                    "all": {"recall@20": 0.5, "ndcg@20": 0.375},
                    "among": {"recall@20": 0.75, "ndcg@20": 0.625},
                },
            ],
        },
        "learning": [
            {
                "task": "retrieval",
                "history": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "ndcg@10": 0.1}],
            }
        ],
        "examples": [
            {
                "user": "u<1>",
                "history_length": 12,
                "history": [item],
                "targets": [item],
                "lists": [{"name": "EASE", "items": [{**item, "hit": True}]}],
            }
        ],
        "seconds": [{"what": "EASE", "seconds": 1.5}],
        "config": {"name": "</pre>"},
    }
    return made | {"findings": findings(made)}


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory):
    written = tmp_path_factory.mktemp("report")
    report.write(tree, written)
    return written


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text("utf-8")


class _Balanced(HTMLParser):
    """Collects tags, and counts how elements that need an end tag are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag in ("section", "table", "div", "svg", "figure", "details", "ul", "ol", "main", "g"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()


def test_the_page_loads_nothing_from_elsewhere(page):
    assert not re.search(r"https?:|@import|url\((?!#)|<script|<link|<img", page)
    parsed = _Balanced()
    parsed.feed(page)
    assert all(link.startswith("#") for link in parsed.links)


def test_the_page_is_well_formed_and_has_its_figures(page):
    parsed = _Balanced()
    parsed.feed(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == 9


def test_texts_of_the_data_are_escaped(page):
    assert "&lt;script&gt;" in page
    assert "a <b>name</b>" not in page
    assert "u&lt;1&gt;" in page
    assert "EASE &lt;&amp;&gt;" in page
    assert page.count("</pre>") == 1


def test_figures_take_the_colours_of_the_page(page):
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_the_json_is_the_whole_report_and_draws_the_same_page(tree, folder, page, tmp_path):
    again = json.loads((folder / "report.json").read_text("utf-8"))
    assert again == json.loads(json.dumps(tree))
    report.write(again, tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8") == page


def test_the_headline_is_the_last_model_even_where_another_did_better(tree, tmp_path):
    last = tree["models"][0]
    report.write(tree | {"models": tree["models"][::-1], "comparisons": []}, tmp_path)
    head = (tmp_path / "report.html").read_text("utf-8").partition("</header>")[0]
    assert f"<b>{last['metrics']['ndcg@10']['mean']:.4f}</b>" in head


def test_sections_without_data_are_left_out(tree, tmp_path):
    bare = tree | {"predictions": {}, "examples": [], "learning": [], "ks": [10], "comparisons": []}
    bare |= {"by_events": None, "cold_items": None}
    report.write(bare, tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Predictions of the ranker" not in page
    assert "Examples" not in page
    assert "Cold start" not in page


def test_cold_items_are_shown_and_a_model_that_cannot_tell_them_apart_has_no_figure(page):
    row = next(r for r in page.split("<tr") if "EASE" in r and "0.1250" in r)
    assert row.count("–") == 2
    row = next(r for r in page.split("<tr") if "0.6250" in r)
    assert [f"{v:.4f}" in row for v in (0.75, 0.5, 0.375)] == [True] * 3


def test_metrics_stand_by_tenth_of_the_targets_popularity(tree, page):
    found = tree["models"][1]["segments"]["popularity"][0]
    part = page.partition("Metrics by tenth of the items")[2].partition("</details>")[0]
    assert f"{found['ndcg@10']:.4f}" in part
    assert "NDCG@10" in part
    assert "HR@10" in part


def test_the_terminal_table_has_a_line_for_each_model_and_marks_the_best(tree):
    lines = report.text_table(tree).splitlines()
    assert lines[0].split()[:3] == ["NDCG@10", "HR@10", "MRR@10"]
    assert lines[2].startswith("EASE <&>")
    assert lines[3].startswith("two-tower + ranker")
    assert "*1.0000 [" in lines[3]
    assert "*" not in lines[2]
    assert any("ALS was left out: it was too much." in line for line in lines)


def _user(name, history, recommended, hits=(), length=None, model="two-tower"):
    """A user as report.json holds one; titles are named by their ids."""

    def items(ids):
        return [{"id": i, "title": f"Title {i}"} for i in ids]

    ours = [{**item, "hit": item["id"] in hits} for item in items(recommended)]
    others = [{**item, "hit": True} for item in items("z")]
    return {
        "user": name,
        "history_length": length or len(history),
        "history": items(history),
        "targets": items(hits),
        "lists": [{"name": model, "items": ours}, {"name": "EASE", "items": others}],
    }


def test_the_terminal_shows_users_with_what_they_did_and_what_our_model_recommends():
    shown = report.text_examples(
        {"examples": [_user("7", "ab", "cde", hits="d", length=1234), _user("x", "", "f")]}
    )
    assert shown == (
        "user 7, 1,234 events known, the newest first\n"
        "      Title a\n"
        "      Title b\n"
        "  recommended by two-tower; * is what came next\n"
        "   1  Title c\n"
        "   2* Title d\n"
        "   3  Title e\n"
        "\n"
        "user x, 0 events known, the newest first\n"
        "  recommended by two-tower; * is what came next\n"
        "   1  Title f"
    )


def test_the_terminal_shows_five_events_of_a_user_and_every_place_of_his_list():
    lines = report.text_examples({"examples": [_user("7", "abcdefg", "hijklmnopq")]}).splitlines()
    assert lines[1:6] == [f"      Title {i}" for i in "abcde"]
    assert lines[6].startswith("  recommended by")
    assert (lines[7], lines[-1]) == ("   1  Title h", "  10  Title q")
    assert len(lines) == 17


def test_without_examples_the_terminal_shows_none():
    assert report.text_examples({"examples": []}) == ""


def test_a_win_beyond_chance_is_called_one():
    said = findings(
        {
            "comparisons": [
                {
                    "role": "baseline",
                    "of": "A",
                    "to": "B",
                    "metric": "ndcg@10",
                    "difference": 0.03,
                    "ratio": 1.5,
                    "low": 0.01,
                    "high": 0.05,
                    "sure": True,
                }
            ],
            "skipped": {},
        }
    )
    assert said == [
        "A is 50% above the best baseline, B, in NDCG@10: +0.0300, 95% interval [+0.0100, +0.0500]."
    ]


@pytest.mark.parametrize(
    ("difference", "sure", "says"),
    [
        (-0.01, True, "does NOT improve on retrieval alone"),
        (0.0, False, "does NOT improve on retrieval alone"),
        (0.01, False, "which may be chance"),
    ],
)
def test_a_ranker_that_does_not_improve_is_said_not_to(difference, sure, says):
    told = {
        "role": "retrieval",
        "of": "A",
        "to": "B",
        "metric": "ndcg@10",
        "difference": difference,
        "ratio": 1 + difference,
        "low": -0.02,
        "high": 0.02,
        "sure": sure,
    }
    (said,) = findings({"comparisons": [told], "skipped": {}})
    assert says in said


def test_a_round_has_the_users_with_targets_and_counts_users_of_items(around):
    assert around.users.tolist() == [0, 1, 3]
    assert around.lengths.tolist() == [2, 1, 0]
    assert around.offsets.tolist() == [0, 1, 3, 4]
    assert around.targets.tolist() == [3, 4, 3, 2]
    assert around.popularity.tolist() == [0, 3, 1, 0, 0, 0]
    assert around.items_with_events == 4
    assert around.num_users == 4


def test_without_attributes_items_are_alike_that_the_same_users_met():
    rows = [(u, i, TRAIN) for u in range(200) for i in ((1, 2) if u % 2 else (3,))]
    events = _interactions([*rows, (200, 1, TEST)], 201)
    made = Round.of(events.part(TRAIN), events.part(TEST), np.zeros((4, 0), np.float32), 0)
    unit = made.vectors[1:] / np.linalg.norm(made.vectors[1:], axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert cosines[0, 1] == pytest.approx(1)
    assert abs(cosines[0, 2]) < 0.5


def test_a_row_has_the_metrics_by_hand(rows):
    good = rows[1].tree
    assert good["metrics"]["hr@1"]["mean"] == 1
    # User 1 holds out items 4 and 3 and gets both first; the other two their one item.
    assert good["metrics"]["ndcg@10"]["mean"] == pytest.approx(1)
    assert good["metrics"]["recall@1"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert good["beyond"]["coverage@1"] == 3 / 4
    assert set(good["metrics"]) == {f"{m}@{k}" for m in metrics.RANKING for k in KS}
    estimate = rows[0].tree["metrics"]["ndcg@10"]
    assert estimate["low"] <= estimate["mean"] <= estimate["high"]


def test_segments_count_users_and_targets(rows):
    segments = rows[1].tree["segments"]
    assert [(s["segment"], s["count"]) for s in segments["history"]] == [("0", 1), ("1-5", 2)]
    assert sum(s["count"] for s in segments["popularity"]) == 4
    assert all(s["ndcg@10"] > 0 for s in segments["popularity"])


def test_a_comparison_is_paired_and_sure_only_where_zero_is_outside(rows):
    told = compare(rows[1], rows[0], "ndcg@10")
    assert told["difference"] > 0
    assert told["low"] <= told["difference"] <= told["high"]
    assert told["sure"] == (told["low"] > 0)
    assert compare(rows[1], rows[1], "ndcg@10")["sure"] is False


def test_without_resamples_there_are_no_intervals(around):
    lists = np.array([[3], [4], [2]], np.int32)
    row = measure("als", "ALS", lists, around, [1], 0, 1)
    assert row.tree["metrics"]["hr@1"] == {"mean": 1.0}
    assert "low" not in compare(row, row, "hr@1")


def test_the_headline_is_at_ten_or_the_largest_k():
    assert measures.headline([1, 10, 50]) == 10
    assert measures.headline([1, 5]) == 5


def test_exposure_by_tenth_sums_to_one(rows):
    assert sum(rows[1].tree["exposure"]) == pytest.approx(1)


def test_predictions_are_set_beside_what_knows_nothing():
    told = classification(np.array([0.9, 0.1]), np.array([True, False]))
    assert told["auc"] == 1
    assert told["log_loss"] == pytest.approx(-math.log(0.9))
    assert told["log_loss_of_the_rate"] == pytest.approx(math.log(2))
    stars = regression(np.array([4.0, 2.0]), np.array([5.0, 2.0]), 3.0)
    assert stars["rmse"] == pytest.approx(math.sqrt(0.5))
    assert stars["rmse_of_the_mean"] == pytest.approx(math.sqrt(2.5))


def test_a_measure_that_does_not_exist_is_none_and_not_nan():
    told = classification(np.array([0.9]), np.array([True]))
    assert told["auc"] is None
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("metric", "value", "written"),
    [
        ("ndcg@10", 0.12345, "0.1235"),
        ("coverage@10", 0.5, "0.500"),
        ("novelty@10", 3.14159, "3.14"),
        ("popularity@10", 1234.5, "1,234"),
        ("popularity@10", 1.25, "1.2500"),
    ],
)
def test_numbers_are_written_as_the_metric_usually_is(metric, value, written):
    assert number(metric, value) == written
