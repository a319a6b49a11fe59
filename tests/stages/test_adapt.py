"""adapt: a model complete on disk, made once, resumed after a kill, for any kind of data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import checkerboard as board
import numpy as np
import pytest
from tiny_bert import write_tiny_bert

from tfrec.artifact import Artifact
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TRAIN, VALID, Interactions
from tfrec.data.splits import labelled
from tfrec.errors import ArtifactError, ConfigError, InputError
from tfrec.models.engine import load_recommender, load_two_tower
from tfrec.models.named import named_variables, read, save
from tfrec.models.text import TextEncoder
from tfrec.recommender import Request
from tfrec.stages import adapt, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the checkerboard with a frozen BERT; changed by no test."""
    return board.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Files, and a run of them by the tiny settings; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("small")
    board.write(folder)
    return board.train(folder / "run", board.config(folder)).parent


def artifact(out, task="retrieval") -> Artifact:
    return Artifact.load(out / "adapt" / task, task)


def vectors(out, cut="select") -> np.ndarray:
    return np.load(artifact(out).file(f"{cut}/vectors.npy"), allow_pickle=False)


def told(out, task="ranking") -> dict:
    return json.loads(artifact(out, task).file("model.json").read_text())


class TestArtifacts:
    def test_they_hold_what_serving_needs(self, finished):
        names = set(artifact(finished).files)
        assert {"model.json", "history.json", "text.npy", "profile.npy"} <= names
        for cut in ("select", "test", "final"):
            assert {f"{cut}/vectors.npy", f"{cut}/weights.safetensors"} <= names
        assert {"model.json", "history.json", "weights.safetensors", "final/linear.npy"} <= set(
            artifact(finished, "ranking").files
        )

    def test_they_name_their_parents(self, finished):
        dataset = Artifact.load(finished / "prepare")
        assert artifact(finished).parents == {"dataset": dataset.digest}
        assert artifact(finished, "ranking").parents == {
            "dataset": dataset.digest,
            "retrieval": artifact(finished).digest,
        }

    def test_nothing_unfinished_is_left_beside_them(self, finished):
        assert sorted(p.name for p in (finished / "adapt").iterdir()) == ["ranking", "retrieval"]

    def test_the_learning_curve_has_a_record_of_each_epoch(self, finished):
        history = json.loads(artifact(finished).file("history.json").read_text())
        assert [record["epoch"] for record in history] == list(range(1, 31))
        assert ["ndcg@10" in record for record in history] == ([False] * 9 + [True]) * 3

    @pytest.mark.parametrize("cut", ["select", "test", "final"])
    def test_a_reloaded_model_encodes_as_the_trained_one_did(self, finished, cut):
        dataset = Dataset.load(finished / "prepare")
        model, text = load_two_tower(artifact(finished), dataset, cut)
        rows = np.arange(len(dataset.catalog), dtype=np.int32)
        again = model.encode_candidate(text, dataset.catalog.features, rows)
        np.testing.assert_allclose(again[1:], vectors(finished, cut)[1:], atol=1e-6)
        assert not vectors(finished, cut)[0].any()

    def test_the_cuts_differ(self, finished):
        made = [vectors(finished, cut) for cut in ("select", "test", "final")]
        for first, second in ((0, 1), (1, 2), (0, 2)):
            assert np.abs(made[first] - made[second]).max() > 1e-4


class TestWhatWasDoneBefore:
    def test_the_same_recipe_is_not_trained_again(self, small, monkeypatch):
        monkeypatch.setattr(adapt, "Trainer", None)
        before = artifact(small / "run")
        again = adapt.run(board.config(small), small / "run", "retrieval")
        assert (again.digest, again.created) == (before.digest, before.created)

    def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(self, small, tmp_path):
        (tmp_path / "prepare").symlink_to(small / "run" / "prepare")
        tiny = board.config(small, "adapt.refit=false")
        adapt.run(tiny, tmp_path, "retrieval")
        np.testing.assert_array_equal(vectors(tmp_path), vectors(small / "run"))
        assert told(tmp_path, "retrieval")["cuts"] == ["select"]
        assert not any(name.startswith(("test/", "final/")) for name in artifact(tmp_path).files)

        first = artifact(tmp_path).digest
        other = board.config(small, "adapt.refit=false", "seed=2", "adapt.retrieval.epochs=1")
        adapt.run(other, tmp_path, "retrieval")
        assert artifact(tmp_path).digest != first
        assert np.abs(vectors(tmp_path) - vectors(small / "run")).max() > 1e-3
        # without refits the chosen weights serve every purpose
        rows = load_recommender(tmp_path).vectors
        np.testing.assert_array_equal(rows, vectors(tmp_path))

    def test_a_ranker_is_refused_beside_a_retrieval_of_another_digest(self, small, tmp_path):
        for part in ("prepare", "adapt/ranking"):
            (tmp_path / part).parent.mkdir(exist_ok=True)
            (tmp_path / part).symlink_to(small / "run" / part)
        other = board.config(small, "adapt.retrieval.epochs=1", "seed=2")
        adapt.run(other, tmp_path, "retrieval")
        with pytest.raises(ArtifactError, match="adapt --task ranking"):
            load_recommender(tmp_path)


CODE = """
import sys
sys.path[:0] = {path!r}
import conftest, checkerboard as board
from pathlib import Path
from tfrec import cli
sys.exit(cli.main(["adapt", "files", "--task", "retrieval", "--out", sys.argv[1],
    *(part for s in board.arguments(Path(sys.argv[2]), *sys.argv[3:]) for part in ("--set", s))]))
"""


def command(small, out, *settings: str) -> list[str]:
    path = [p for p in sys.path if p]
    code = CODE.format(path=path)
    return [sys.executable, "-c", code, str(out), str(small), *settings]


def wait_for_epoch(process, out, epoch: int) -> None:
    """Until a checkpoint of at least this epoch is on disk."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        for state in out.glob("adapt/.retrieval.work/*/select/state.json"):
            if json.loads(state.read_text())["epoch"] >= epoch:
                return
        time.sleep(0.05)
    raise AssertionError("no epoch was finished in time")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_training_that_was_stopped_goes_on_where_it_was(sent, code, small, tmp_path):
    (tmp_path / "prepare").symlink_to(small / "run" / "prepare")
    settings = ("adapt.retrieval.epochs=600", "adapt.refit=false", "adapt.retrieval.patience=0")
    line = command(small, tmp_path, *settings)
    environment = {k: v for k, v in os.environ.items() if k != "TFREC_DEBUG"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_epoch(process, tmp_path, 3)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    if sent == signal.SIGINT:
        assert said.splitlines()[-1].startswith("tfrec: interrupted")
    assert not (tmp_path / "adapt" / "retrieval").exists()
    (state,) = tmp_path.glob("adapt/.retrieval.work/*/select/state.json")
    stopped = json.loads(state.read_text())
    assert 3 <= stopped["epoch"] < 600
    # The same recipe in this process, so that only the epochs left are seen.
    done = board.config(small, *settings)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt._Job, "trackers", lambda *_: [_Watch(seen, stopped["epoch"] + 4)])
        with pytest.raises(KeyboardInterrupt):
            adapt.run(done, tmp_path, "retrieval")
    assert seen[0] == stopped["epoch"]
    assert json.loads(state.read_text())["history"][: stopped["epoch"]] == stopped["history"]


def _Watch(seen: list[int], last: int):
    from tfrec.models.keras_bridge import tf_keras

    class Watch(tf_keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(epoch)
            if epoch == last:
                raise KeyboardInterrupt

    return Watch()


def test_a_resumed_training_ends_as_an_undisturbed_one(small, tmp_path, monkeypatch):
    (tmp_path / "prepare").symlink_to(small / "run" / "prepare")
    tiny = board.config(small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt._Job, "trackers", lambda *_: [_Watch([], 1)])
        with pytest.raises(KeyboardInterrupt):
            adapt.run(tiny, tmp_path, "retrieval")
    adapt.run(tiny, tmp_path, "retrieval")
    for cut in ("select", "final"):
        np.testing.assert_allclose(vectors(tmp_path, cut), vectors(small / "run", cut), atol=1e-6)


class TestKindsOfData:
    """Each run is tiny and stands for several kinds at once."""

    @pytest.fixture
    def run(self, tmp_path):
        def run(*settings, items=True, **data):
            board.write(tmp_path, **data)
            config = board.config(tmp_path, *settings, items=items)
            out = board.train(tmp_path / "run", config)
            recommender = load_recommender(out)
            users = np.arange(4, dtype=np.int32)
            known = recommender.interactions
            for found in recommender.lists(known, users, 3).values():
                assert (found.ids > 0).all()
                assert np.isfinite(found.scores).all()
            told = recommender.predictions(known, known)
            assert all(np.isfinite(values).all() for values in told.values())
            return out, recommender

        return run

    def test_time_split_without_ratings_and_without_items(self, run):
        out, recommender = run("data.split=time", items=False, ratings=False)
        assert told(out)["tasks"] == ["click"]
        assert recommender.text.shape[1] == 0
        assert recommender.catalog.features.shape[1] == 0
        assert np.isfinite(artifact(out, "ranking").metrics["validation"])

    def test_cold_items_with_purchases_and_the_sampled_loss(self, run):
        out, _ = run(
            "data.split=item_cold",
            "adapt.retrieval.loss=sampled",
            "adapt.retrieval.positions=4",
            "adapt.retrieval.uniform_negatives=8",
            "adapt.ranking.linear_of_new=true",
            purchases=True,
        )
        assert told(out)["tasks"] == ["click", "like", "rating", "conversion"]
        self.cold_items_have_no_id(out)

    def cold_items_have_no_id(self, out):
        dataset = Dataset.load(out / "prepare")
        features = dataset.catalog.features
        rows = np.arange(len(features), dtype=np.int32)
        for cut, parts in (("select", (TRAIN,)), ("test", (TRAIN, VALID))):
            known = np.unique(dataset.interactions.part(*parts).item)
            cold = np.setdiff1d(rows[1:], known)
            model, text = load_two_tower(artifact(out), dataset, cut)
            bare = model.encode_candidate(text, features, np.zeros_like(rows))
            with_id = model.encode_candidate(text, features, rows)
            written = vectors(out, cut)
            np.testing.assert_allclose(written[cold], bare[cold], atol=1e-6)
            np.testing.assert_allclose(written[known], with_id[known], atol=1e-6)
            assert len(cold)
            linear = np.load(artifact(out, "ranking").file(f"{cut}/linear.npy"))
            assert (np.abs(linear[:, cold]).max(axis=0) > 0).all()
            assert np.abs(bare - with_id)[known].max() > 1e-3

    def test_cold_users_with_hard_negatives(self, run):
        run(
            "data.split=user_cold",
            "adapt.retrieval.loss=sampled",
            "adapt.retrieval.positions=4",
            "adapt.retrieval.uniform_negatives=8",
            "adapt.retrieval.hard_negatives=4",
        )

    def test_first_events_that_tell_nothing_leave_it_to_popularity(self, tmp_path):
        """Some items are met by nearly all, and who met which says nothing of who meets what."""
        rng = np.random.default_rng(5)
        users, items, length = 150, 60, 30
        share = 1.0 / np.arange(1, items + 1)
        rows = ["user_id,item_id,timestamp"]
        for user in range(users):
            met = rng.choice(items, length, replace=False, p=share / share.sum())
            rng.shuffle(met)
            rows += [f"u{user},i{item},{1000 + place}" for place, item in enumerate(met)]
        (tmp_path / "events.csv").write_text("\n".join(rows) + "\n")
        config = board.config(
            tmp_path,
            "data.split=user_cold",
            "data.valid_fraction=0.3",
            "adapt.refit=false",
            items=False,
        )
        out = board.train(tmp_path / "run", config)
        chosen = told(out)
        assert chosen["newcomer"] > 0
        recommender = load_recommender(out, "select")
        assert recommender.policy.newcomer == chosen["newcomer"]
        few = recommender.recommend([Request(history=("i20",))], 5)[0]
        popular = {f"i{item}" for item in range(12)}
        assert len({found.item_id for found in few} & popular) >= 4

    def test_no_split_and_no_linear_model(self, run):
        out, _ = run("data.split=none", "adapt.ranking.linear_items=0")
        assert told(out, "retrieval")["cuts"] == ["select"]
        assert told(out)["score"] == {"retrieval": 1.0}
        assert told(out)["linear"] is None

    def test_a_score_that_is_given_is_taken(self, run):
        score = {"retrieval": 1.0, "click": 0.5, "like": 0.25, "linear": 2.0}
        out, recommender = run(f"adapt.ranking.score={json.dumps(score)}")
        assert told(out)["score"] == score
        assert recommender.policy.ranks

    def test_a_part_that_the_run_does_not_have_is_refused(self, small, tmp_path):
        shutil.copytree(small / "run", tmp_path / "run")
        config = board.config(small, 'adapt.ranking.score={"conversion": 1.0}', items=False)
        with pytest.raises(ConfigError, match="names 'conversion', and this run has only"):
            adapt.run(config, tmp_path / "run", "ranking")


class TestTasks:
    """One ranker a run, of the tasks that are asked for."""

    @pytest.fixture
    def again(self, small, tmp_path):
        """Ranks anew on the small run's retrieval."""

        def again(*settings, folder=small):
            (tmp_path / "adapt").mkdir(exist_ok=True)
            for part in ("prepare", "adapt/retrieval"):
                (tmp_path / part).symlink_to(folder / "run" / part)
            adapt.run(board.config(folder, *settings), tmp_path, "ranking")
            return tmp_path

        return again

    def test_ratings_alone_are_validated_by_their_error_and_predicted(self, again):
        out = again("adapt.ranking.tasks=[rating]", "adapt.ranking.fusion=gated")
        assert told(out)["tasks"] == ["rating"]
        (record,) = json.loads(artifact(out, "ranking").file("history.json").read_text())
        assert record["skill"] <= 1
        recommender = load_recommender(out)
        known = recommender.interactions
        (ratings,) = recommender.predictions(known, known).values()
        assert np.isfinite(ratings).all()
        assert ratings.std() > 0

    def test_clicks_alone_with_learned_weights_and_a_linear_fusion(self, again):
        out = again(
            "adapt.ranking.tasks=[click]",
            "adapt.ranking.fusion=linear",
            "adapt.ranking.task_weighting=uncertainty",
        )
        assert told(out)["tasks"] == ["click"]
        weight = artifact(out, "ranking").metrics["task_weights"]["click"]
        assert weight != 1
        model = load_recommender(out).engine.ranker
        assert model.task_weights["click"] == pytest.approx(weight)

    @pytest.mark.parametrize(
        ("task", "lacking"), [("rating", "no rating"), ("conversion", "no event 'purchase'")]
    )
    def test_a_task_that_the_data_cannot_support_is_named(self, task, lacking, tmp_path):
        board.write(tmp_path, ratings=False)
        data = Dataset.from_columns(board.events(ratings=False), board.item_table())
        with pytest.raises(InputError, match=f"'{task}': the data has {lacking}.* supports click"):
            adapt._tasks(data, [task])

    def test_texts_of_items_are_read_in_the_directions_that_are_saved(self, finished):
        recommender = load_recommender(finished)
        width = told(finished)["sizes"]["text_width"]
        assert 0 < width <= 32
        assert recommender.described.shape == (board.ITEMS + 1, width)
        read = recommender.described[1:]
        np.testing.assert_allclose(read.std(axis=0), 1, rtol=0.01)


def test_users_that_are_left_out_teach_neither_retrieval_nor_ranking(small, tmp_path):
    """Whatever they met, in another order, the models of the others are the same to the bit."""
    settings = board.config(small, "adapt.users=0.5", "adapt.refit=false")
    first = board.train(tmp_path / "one", settings)
    dataset = Dataset.load(tmp_path / "one" / "prepare")
    events = dataset.interactions
    own = labelled(len(dataset.users), 0.5, settings.seed)[events.user]
    item = events.item.copy()
    for part in np.unique(events.split):  # how often each is met in all stays
        others = ~own & (events.split == part)
        item[others] = np.roll(item[others], 7)
    assert (item != events.item).any()
    other = tmp_path / "two"
    Dataset(replace(events, item=item), dataset.catalog, dataset.users).save(other / "prepare")
    for task in ("retrieval", "ranking"):
        adapt.run(settings, other, task)
        found, here = artifact(other, task).files, artifact(first, task).files
        learned = {name for name in here if name.endswith((".npy", "weights.safetensors"))}
        assert {name for name in learned if found[name] != here[name]} == set()
    assert "select/linear.npy" in learned


class TestTooLittle:
    """Either it works, or one line says what is lacking."""

    def attempt(self, folder, lines, *settings):
        (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
        config = board.config(folder, *settings, items=False)
        return board.train(folder / "run", config)

    def test_two_items(self, tmp_path):
        lines = [f"u{u},i{u % 2},{t}" for u in range(6) for t in range(4)]
        out = self.attempt(tmp_path, lines)
        assert load_recommender(out).recommend([], 1) == []

    def test_a_single_user(self, tmp_path):
        out = self.attempt(tmp_path, [f"u,i{t},{t}" for t in range(5)], "data.split=none")
        assert told(out)["tasks"] == []
        assert load_recommender(out).recommend([Request(user_id="u")], 1) == [[]]

    def test_one_event_of_each_user(self, tmp_path, capsys):
        """Nothing to learn a ranker from: the other parts of the score are there without one."""
        lines = [f"u{u},i{u % 3},{u}" for u in range(6)]
        out = self.attempt(tmp_path, lines, "data.split=none")
        (said,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("tfrec:")]
        assert "no event to learn from" in said
        assert told(out)["tasks"] == []
        assert "final/linear.npy" in artifact(out, "ranking").files or told(out)["linear"]
        recommender = load_recommender(out)
        assert recommender.policy.tasks == ()
        (answer,) = recommender.recommend([Request(user_id="u0")], 2)
        assert {found.item_id for found in answer} == {"i1", "i2"}
        assert recommender.predictions(recommender.interactions, recommender.interactions) == {}

    def test_a_task_that_is_asked_for_and_cannot_be_learned_is_an_error(self, tmp_path):
        lines = [f"u{u},i{u % 3},{u}" for u in range(6)]
        with pytest.raises(InputError, match="no event to learn from"):
            self.attempt(tmp_path, lines, "data.split=none", "adapt.ranking.tasks=[click]")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return board.tuned(tmp_path_factory, "full")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return board.tuned(tmp_path_factory, "lora")


class TestTextTuned:
    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_the_bert_itself_changes_and_each_cut_has_texts_of_its_own(self, method, request):
        found = artifact(request.getfixturevalue(method))
        before = np.load(found.file("text.npy"))
        select, final = (np.load(found.file(f"{cut}/text.npy")) for cut in ("select", "final"))
        assert np.abs(select - before).max() > 1e-4
        assert np.abs(final - select).max() > 1e-5

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_the_reloaded_bert_reads_as_the_trained_one_did(self, method, request):
        recommender = load_recommender(request.getfixturevalue(method))
        texts = recommender.catalog.texts[1:4]
        again = recommender.engine.encode_text(texts)
        np.testing.assert_allclose(again, recommender.text[1:4], atol=1e-5)

    def test_only_the_difference_to_the_base_is_saved(self, full, lora):
        names = set(read(artifact(lora).file("final/weights.safetensors")))
        bert = {name for name in names if name.startswith("encoder.")}
        assert len(bert) == 8
        assert all("lora_kernel" in name for name in bert)
        assert {"candidate_tower.ids", "candidate_tower.text.kernel"} <= names - bert
        sizes = [artifact(run).metrics["difference_bytes"] for run in (full, lora)]
        assert sizes[1] == artifact(lora).files["select/weights.safetensors"]["bytes"]
        assert sizes[0] - sizes[1] > 4 * 20_000

    def test_what_was_trained_and_what_it_took_is_told(self, lora):
        told = artifact(lora).metrics
        # 2 layers, query and value, rank 4: A is 32 x 2 heads x 4, B is 4 x 16
        assert told["text_weights_trained"] == 2 * 2 * (32 * 2 * 4 + 4 * 16)
        encoder = TextEncoder.load(lora.parent / "bert", length=16)
        base = sum(v.numpy().size for v in named_variables(encoder).values())
        assert told["text_weights_total"] == base + told["text_weights_trained"]
        towers = told["weights"] - told["text_weights_trained"]
        assert told["weights_total"] == towers + told["text_weights_total"]
        assert 0 < told["step_seconds"] < 600
        assert 10 < told["peak_memory_mb"] < 1e6

    def test_a_frozen_bert_counts_too(self, finished):
        told = artifact(finished).metrics
        assert told["text_weights_trained"] == 0
        assert told["weights_total"] == told["weights"] + told["text_weights_total"]

    @pytest.mark.parametrize("method", ["lora", "head"])
    def test_another_base_is_refused(self, method, request, finished):
        run = finished if method == "head" else request.getfixturevalue(method)
        with board.other_bert(run) as other, pytest.raises(ArtifactError) as refused:
            load_recommender(run).engine.encode_text(["war"])
        line = str(refused.value)
        assert other.digest()[:12] in line
        assert told(run, "retrieval")["text_digest"][:12] in line
        assert "\n" not in line
        assert "train again" in line

    def test_a_weight_that_is_not_there_is_named(self, lora, tmp_path):
        found = artifact(lora)
        shutil.copytree(found.path, tmp_path / "copy")
        path = tmp_path / "copy" / "final" / "weights.safetensors"
        weights = read(path)
        del weights["candidate_tower.ids"]
        save(path, weights)
        broken = replace(found, path=tmp_path / "copy")
        with pytest.raises(ArtifactError, match=r"has no weight 'candidate_tower\.ids'"):
            load_two_tower(broken, Dataset.load(lora / "prepare"), "final")

    def test_a_layer_that_is_not_there_is_named_and_nothing_is_left(self, small, tmp_path):
        write_tiny_bert(tmp_path / "bert")
        wrong = ("adapt.tuning.text=lora", "adapt.tuning.layers=[5]")
        config = board.config(
            small, f"adapt.text={tmp_path / 'bert'}", *wrong, 'data.item_text=["title"]'
        )
        with pytest.raises(ConfigError, match=r"adapt.tuning.layers names layer 5"):
            board.train(tmp_path / "run", config, ["retrieval"])
        assert not (tmp_path / "run" / "adapt" / "retrieval").exists()


def test_profiles_without_item_texts_leave_the_bert_as_it_is(small, tmp_path):
    write_tiny_bert(tmp_path / "bert")
    (tmp_path / "users.csv").write_text("user_id,likes\nu0,the war film\nu1,a love story\n")
    settings = (
        f"adapt.text={tmp_path / 'bert'}",
        "adapt.tuning.text=full",
        "adapt.retrieval.epochs=1",
        "adapt.refit=false",
        f"data.users={tmp_path / 'users.csv'}",
    )
    config = board.config(small, *settings, items=False)
    out = board.train(tmp_path / "run", config, ["retrieval"])
    assert told(out, "retrieval")["profile_width"] == 32
    assert load_recommender(out).text.shape[1] == 0


class TestScore:
    def test_held_out_events_are_those_of_each_user(self, small):
        dataset = Dataset.load(small / "run" / "prepare")
        valid: Interactions = dataset.interactions.part(VALID)
        users, targets, offsets, times = adapt.held_out(valid)
        for place, user in enumerate(users):
            start, stop = offsets[place : place + 2]
            assert targets[start:stop].tolist() == valid.histories([user])[0].tolist()
            assert times[place] == valid.timestamp[valid.user == user].min()

    def test_a_part_that_finds_the_target_gets_weight_and_noise_gets_none(self):
        rng = np.random.default_rng(5)
        rows = np.tile(np.arange(1, 101, dtype=np.int32), (300, 1))
        target = rng.integers(1, 101, 300).astype(np.int32)
        right = (rows == target[:, None]).astype(np.float32)
        noise = rng.normal(size=(3, *rows.shape)).astype(np.float32)
        parts = {
            "retrieval": noise[0] + right,
            "text": 0.01 * (noise[1] + 2 * right),
            "popularity": np.zeros_like(right),
        }
        score, found = adapt._choose_score(parts, rows, target)
        assert set(score) == {"retrieval", "text"}
        # In units of each part's own spread, the better part counts more.
        assert 1.0 <= 0.01 * score["text"] <= 5.0
        assert found["validation"] > 1.5 * found["validation_retrieval_alone"]

    def test_the_ranker_is_validated(self, finished):
        records = json.loads(artifact(finished, "ranking").file("history.json").read_text())
        assert records
        assert all(0 <= record["ndcg@10"] <= 1 for record in records)

    def test_ndcg_is_that_of_the_definition(self):
        rows = np.array([[1, 2, 3], [1, 2, 3], [4, 5, 0], [4, 5, 0]], np.int32)
        score = np.array([[3, 2, 1], [3, 2, 1], [1, 2, 9], [1, 2, 9]], np.float32)
        # places 1 and 3; place 2, the padding's 9 not counted; not among the candidates
        target = np.array([1, 3, 4, 7], np.int32)
        expected = (1 + 1 / 2 + 1 / np.log2(3) + 0) / 4
        assert adapt._ndcg(score, rows, target) == pytest.approx(expected)


def test_the_checkerboard_is_recovered(finished):
    recommender = load_recommender(finished, cut="test")
    dataset = Dataset.load(finished / "prepare")
    users = np.arange(board.USERS, dtype=np.int32)
    for name, found in recommender.lists(recommender.interactions, users, 3).items():
        right = [
            board.colour(recommender.catalog.ids[row]) == board.colour(dataset.users.ids[user])
            for user, ids in zip(users, found.ids, strict=True)
            for row in ids
        ]
        assert np.mean(right) > 0.95, name


def test_without_a_prepared_dataset_it_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="run the stage that makes it first"):
        adapt.run(board.config(tmp_path), tmp_path, "retrieval")


def test_ranking_without_retrieval_says_so(tmp_path):
    board.write(tmp_path, users=6, items=16)
    tiny = board.config(tmp_path)
    prepare.run(tiny, tmp_path / "run")
    with pytest.raises(ArtifactError, match="retrieval"):
        adapt.run(tiny, tmp_path / "run", "ranking")
    assert not (tmp_path / "run" / "adapt").exists()


def test_a_new_user_is_judged_by_the_second_half_of_his_events():
    split = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2], np.int8)
    user = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3], np.int32)
    n = len(user)
    events = Interactions(
        user=user,
        item=np.arange(1, n + 1, dtype=np.int32),
        timestamp=np.arange(n, dtype=np.int64),
        event=np.zeros(n, np.int8),
        rating=np.ones(n, np.float32),
        weight=np.ones(n, np.float32),
        split=split,
        num_users=4,
    )
    history, wanted = adapt._judged(events)
    assert history.item.tolist() == [1, 2, 4, 5]
    assert wanted.item.tolist() == [3, 6, 7, 8, 9]
    assert split.tolist() == events.split.tolist()
