"""evaluate: the baselines and a model on the same held-out events, and files others can check."""

import csv
import gzip
import json

import numpy as np
import pytest

from tfrec.artifact import Artifact, write_json, writing
from tfrec.baselines import Ease, matrix_of, recommend
from tfrec.config import Config
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.errors import ArtifactError, InputError
from tfrec.index import top_k
from tfrec.stages import evaluate

USERS, ITEMS = 24, 30


class _Recommender:
    """Stands for the trained chain: EASE as retrieval, the very targets as ranking."""

    def __init__(self, dataset, tasks=("click", "like", "rating")):
        self.dataset, self.tasks, self.asked, self.curve = dataset, tasks, None, []

    def lists(self, history, users, k, exclude_history=True, request_time=None, **more):
        if more:
            return self._further(history, users, k, **more)
        self.asked, self.times = (history, exclude_history), request_time
        matrix = matrix_of(history, self.dataset.catalog.num_items)
        found = recommend(Ease(10.0).fit(matrix), matrix, users, k, exclude_history)
        wanted = self.dataset.interactions.part(TEST)
        best = type(found)(found.scores.copy(), found.ids.copy())
        best.ids[:, 0] = wanted.item[wanted.offsets[users]]
        return {"retrieval": found, "ranking": best}

    def _further(self, history, users, k, exclude=None, among=None, profile=True):
        """By the row: the lowest first, of those that may come."""
        rows = np.arange(1, len(self.dataset.catalog)) if among is None else among
        scores = np.tile(-rows.astype(np.float32), (len(users), 1))
        if exclude is not None:
            self.curve.append((np.diff(history.offsets)[users], exclude, profile))
        return {"retrieval": top_k(scores, rows.astype(np.int32), k, exclude)}

    def predictions(self, events, history):
        self.events = events
        return {task: np.full(len(events), 0.25, np.float32) for task in self.tasks}


def _dataset(split="leave_one_out", event=None):
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{i}", 100 * u + t, 1 + (u + i) % 5)
        for u in range(USERS)
        for t, i in enumerate(rng.permutation(ITEMS)[: 5 + u % 7])
    ]
    columns = dict(
        zip(("user_id", "item_id", "timestamp", "rating"), zip(*rows, strict=True), strict=True)
    )
    if event:
        columns["event"] = tuple(event[n % len(event)] for n in range(len(rows)))
    items = {
        "item_id": [f"i{i}" for i in range(ITEMS)],
        "title": [f"Title {i}" for i in range(ITEMS)],
        "genre": ["abc"[i % 3] for i in range(ITEMS)],
    }
    config = Config.parse({"data": {"split": split}}).data
    return Dataset.from_columns(columns, items, config=config)


def _config(**settings):
    base = {"k": [1, 5, 10], "baselines": ["popular", "ease"], "bootstrap": 50}
    return Config.parse({"name": "tiny", "evaluate": base | settings})


def _install(patch, out, dataset, **options):
    """A run folder up to `adapt`, whose recommender is the stand-in."""
    dataset.save(out / "prepare")
    settings = {"adapt": _config().adapt.model_dump(mode="json")}
    for task in ("retrieval", "ranking"):
        with writing(out / "adapt" / task, kind=task, config=settings) as draft:
            history = [{"epoch": 1, "loss": 2.0, "ndcg@10": 0.1}]
            write_json(draft.path / "history.json", history)
            draft.metrics["seconds"] = 3.0
    made = _Recommender(dataset, **options)
    patch.setattr(evaluate, "_load_recommender", lambda _: made)
    return made


@pytest.fixture
def recommender(monkeypatch):
    def install(out, dataset, **options):
        return _install(monkeypatch, out, dataset, **options)

    return install


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Read by several tests, changed by none."""
    out, dataset = tmp_path_factory.mktemp("run"), _dataset()
    with pytest.MonkeyPatch.context() as patch:
        made = _install(patch, out, dataset)
        artifact = evaluate.run(_config(), out)
    return out, dataset, made, artifact


def _tree(artifact):
    return json.loads(artifact.file("report.json").read_text("utf-8"))


def test_it_leaves_a_report_and_a_copy_of_the_page_above(finished):
    out, _, _, artifact = finished
    assert Artifact.load(out / "evaluate", "report").digest == artifact.digest
    assert (out / "report.html").read_bytes() == artifact.file("report.html").read_bytes()
    assert set(artifact.parents) == {"dataset", "retrieval", "ranking"}
    assert not list(out.glob(".*"))


def test_the_table_has_the_baselines_and_both_of_our_models(finished):
    tree = _tree(finished[3])
    assert [(m["key"], m["ours"]) for m in tree["models"]] == [
        ("popular", False),
        ("ease", False),
        ("retrieval", True),
        ("ranking", True),
    ]
    by = {m["key"]: m for m in tree["models"]}
    assert by["ranking"]["metrics"]["ndcg@10"]["mean"] == 1
    assert finished[3].metrics["ranking"]["ndcg@10"] == 1
    roles = {c["role"]: c for c in tree["comparisons"]}
    assert roles["baseline"]["of"] == "two-tower + ranker"
    assert roles["retrieval"]["difference"] > 0
    assert "The ranker improves on retrieval alone" in " ".join(tree["findings"])


def test_models_read_training_and_validation_events_only(finished):
    _, dataset, made, _ = finished
    history, excluded = made.asked
    assert excluded is True
    held_out = dataset.interactions.part(TEST)
    np.testing.assert_array_equal(made.times, held_out.timestamp[held_out.offsets[:-1]])
    assert sorted(set(history.split)) == [TRAIN, VALID]
    assert len(history) == len(dataset.interactions) - USERS


def test_the_lists_are_files_that_others_can_score(finished):
    _, dataset, _, artifact = finished
    with gzip.open(artifact.file("recommendations/ease.csv.gz"), "rt", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["user_id", "item_id", "rank", "score"]
    held_out = {
        dataset.users.ids[u]: dataset.catalog.ids[i]
        for u, i in zip(*_pairs(dataset, TEST), strict=True)
    }
    hits = sum(held_out[r["user_id"]] == r["item_id"] for r in rows if int(r["rank"]) <= 10)
    ease = next(m for m in _tree(artifact)["models"] if m["key"] == "ease")
    assert hits / USERS == pytest.approx(ease["metrics"]["hr@10"]["mean"], abs=1e-12)
    first = [r for r in rows if r["user_id"] == rows[0]["user_id"]]
    assert [int(r["rank"]) for r in first] == list(range(1, len(first) + 1))
    seen = {
        (dataset.users.ids[u], dataset.catalog.ids[i])
        for u, i in zip(*_pairs(dataset, TRAIN, VALID), strict=True)
    }
    assert not seen & {(r["user_id"], r["item_id"]) for r in rows}


def _pairs(dataset, *parts):
    events = dataset.interactions.part(*parts)
    return events.user.tolist(), events.item.tolist()


def test_the_same_recipe_is_not_measured_again_unless_forced(tmp_path, recommender):
    made = recommender(tmp_path, _dataset())
    config = _config(baselines=["popular"])
    artifact = evaluate.run(config, tmp_path)
    made.asked = None
    (tmp_path / "report.html").unlink()
    assert evaluate.run(config, tmp_path).digest == artifact.digest
    assert made.asked is None
    assert (tmp_path / "report.html").exists()
    evaluate.run(config, tmp_path, force=True)
    assert made.asked is not None


def test_examples_show_titles_and_mark_the_hit(finished):
    examples = _tree(finished[3])["examples"]
    assert len(examples) == 3
    for one in examples:
        ours, best = one["lists"]
        assert ours["name"] == "two-tower + ranker"
        assert best["name"] in ("EASE", "most popular")
        assert ours["items"][0]["hit"] is True
        assert ours["items"][0]["title"] == one["targets"][0]["title"]
        assert one["history"][0]["title"].startswith("Title")


def test_predictions_of_each_task_are_measured_on_what_knows_its_label(finished):
    _, dataset, _, artifact = finished
    told = _tree(artifact)["predictions"]
    wanted = dataset.interactions.part(TEST)
    assert set(told) == {"click", "like", "rating"}
    assert told["click"]["positives"] == USERS
    assert told["click"]["events"] == USERS * 8
    assert told["like"]["events"] == USERS
    assert told["like"]["positives"] == int((wanted.rating >= 4).sum())
    assert told["rating"]["rmse"] == pytest.approx(
        float(np.sqrt(np.mean((wanted.rating - 0.25) ** 2))), rel=1e-6
    )


def test_purchases_give_conversion_metrics(tmp_path, recommender):
    dataset = _dataset(event=("view", "purchase"))
    recommender(tmp_path, dataset, tasks=("click", "conversion"))
    told = _tree(evaluate.run(_config(), tmp_path))["predictions"]
    wanted = dataset.interactions.part(TEST)
    bought = int((wanted.event == wanted.event_names.index("purchase")).sum())
    assert told["conversion"]["positives"] == bought > 0
    assert told["conversion"]["events"] == told["click"]["events"]


def test_without_a_ranker_retrieval_is_compared_alone(tmp_path, recommender, monkeypatch):
    dataset = _dataset()
    made = recommender(tmp_path, dataset, tasks=())
    lists = made.lists
    monkeypatch.setattr(made, "lists", lambda *a, **k: {"retrieval": lists(*a, **k)["retrieval"]})
    tree = _tree(evaluate.run(_config(examples=0), tmp_path))
    assert [m["key"] for m in tree["models"]][-1] == "retrieval"
    assert [c["role"] for c in tree["comparisons"]] == ["baseline"]
    assert tree["predictions"] == {}
    assert tree["examples"] == []


@pytest.mark.parametrize("split", ["time", "item_cold", "user_cold"])
def test_every_split_can_be_evaluated(tmp_path, recommender, split):
    dataset = _dataset(split)
    recommender(tmp_path, dataset)
    tree = _tree(evaluate.run(_config(baselines=["popular", "item_knn"]), tmp_path))
    held_out = dataset.interactions.part(TEST)
    assert tree["protocol"]["users"] == len(np.unique(held_out.user))
    assert tree["protocol"]["targets"] == len(held_out)


def test_data_without_test_events_is_refused_before_anything_is_written(tmp_path, recommender):
    recommender(tmp_path, _dataset("none"))
    with pytest.raises(InputError, match=r"no test events.*data\.split"):
        evaluate.run(_config(), tmp_path)
    assert not (tmp_path / "evaluate").exists()


def test_a_run_without_models_says_what_is_missing(tmp_path):
    _dataset().save(tmp_path / "prepare")
    with pytest.raises(ArtifactError, match="retrieval"):
        evaluate.run(_config(), tmp_path)


def test_drawn_items_are_ones_the_user_never_met():
    dataset = _dataset()
    events = dataset.interactions.part(TEST)
    rng = np.random.default_rng(0)
    shown, real = evaluate.with_unobserved(events, dataset.interactions, ITEMS, 4, rng)
    assert real.sum() == len(events)
    assert (shown.item[real] == events.item).all()
    met = set(
        zip(dataset.interactions.user.tolist(), dataset.interactions.item.tolist(), strict=True)
    )
    drawn = zip(shown.user[~real].tolist(), shown.item[~real].tolist(), strict=True)
    assert not met & set(drawn)
    assert np.isnan(shown.rating[~real]).all()
    assert shown.item.min() >= 1
    assert shown.item.max() <= ITEMS


def test_a_user_who_met_every_item_has_nothing_drawn():
    everything = Dataset.from_columns(
        {"user_id": ["a"] * 4, "item_id": list("wxyz"), "timestamp": [1, 2, 3, 4]}
    ).interactions
    shown, real = evaluate.with_unobserved(
        everything.part(TEST), everything, 4, 3, np.random.default_rng(0)
    )
    assert len(shown) == 1
    assert real.tolist() == [True]


def test_the_terminal_summary_is_the_table(finished):
    text = evaluate.summary(finished[3])
    assert "two-tower + ranker" in text
    assert "most popular" in text


class TestCold:
    @pytest.fixture
    def long(self):
        """Users of 12 to 28 events among 60 items; who has 20 or less has no curve."""
        rng = np.random.default_rng(3)
        rows = [
            (f"u{u}", f"i{i}", t)
            for u in range(USERS)
            for t, i in enumerate(rng.permutation(60)[: 12 + u % 17])
        ]
        columns = dict(
            zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True)
        )
        users = {"user_id": [f"u{u}" for u in range(USERS)], "age": [str(u) for u in range(USERS)]}
        config = Config.parse({"data": {"split": "leave_one_out"}}).data
        return Dataset.from_columns(columns, users=users, config=config)

    def test_the_curve_gives_the_same_users_more_and_more_events(self, tmp_path, recommender, long):
        made = recommender(tmp_path, long)
        told = _tree(evaluate.run(_config(baselines=["popular"]), tmp_path))["by_events"]
        able = [u for u in range(USERS) if 12 + u % 17 > 20]
        assert told["users"] == told["targets"] == len(able)
        assert told["events"] == [0, 1, 2, 3, 5, 10, 20]
        assert [counts.tolist() for counts, _, profile in made.curve if not profile] == [
            [count] * len(able) for count in told["events"]
        ]
        assert {len(set(e.ids[e.offsets[0] : e.offsets[1]])) for _, e, _ in made.curve} == {20}
        assert set(told["lines"]) == {"both", "history", "profile"}
        assert told["lines"]["profile"]["hr@10"] == [told["lines"]["both"]["hr@10"][0]] * 7

    def test_the_curve_can_be_left_out(self, tmp_path, recommender, long):
        made = recommender(tmp_path, long)
        artifact = evaluate.run(_config(baselines=["popular"], by_events=0), tmp_path)
        assert _tree(artifact)["by_events"] is None
        assert made.curve == []

    def test_users_of_few_events_have_no_curve(self, finished):
        assert _tree(finished[3])["by_events"] is None
        assert _tree(finished[3])["cold_items"] is None

    def test_cold_items_are_ranked_among_themselves_and_in_the_catalog(
        self, tmp_path, recommender, monkeypatch
    ):
        dataset = _dataset("item_cold")
        made = recommender(tmp_path, dataset)
        config = _config(baselines=["popular"], k=[5])
        config = Config.parse({**config.dump(), "data": {"split": "item_cold"}})
        tree = _tree(evaluate.run(config, tmp_path))
        wanted = dataset.interactions.part(TEST)
        told = tree["cold_items"]
        cold = np.unique(wanted.item)
        assert told["items"] == len(cold) == 3
        assert told["chance"] == 1
        popular, retrieval, _ = told["models"]
        assert "among" not in popular
        # Three items on a list of twenty are all of them.
        assert retrieval["among"]["recall@20"] == 1
        assert retrieval["among"]["ndcg@20"] < 1
        lists = made.lists(dataset.interactions.part(TRAIN, VALID), np.unique(wanted.user), 20)[
            "retrieval"
        ]
        hits = [
            len(set(row) & set(items)) / len(set(items))
            for row, items in zip(lists.ids, wanted.histories(np.unique(wanted.user)), strict=True)
        ]
        assert retrieval["all"]["recall@20"] == pytest.approx(np.mean(hits), abs=1e-12)
        assert tree["by_events"] is None
