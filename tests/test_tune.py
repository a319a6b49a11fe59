"""tune: better settings are found, whatever happens on the way, and the gain is told honestly."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkerboard as board
import optuna
import pytest

from tfrec import trial as one_trial
from tfrec import tune
from tfrec.artifact import Artifact
from tfrec.config import Config
from tfrec.errors import ArtifactError, ConfigError, InputError, SetupError, TfrecError
from tfrec.models.keras_bridge import tf
from tfrec.stages import adapt, prepare
from tfrec.training import TrainingDivergedError
from tfrec.trial import Watch, pruner_of

RATE = "adapt.retrieval.learning_rate"
LAYERS = "adapt.retrieval.layers"
SPACE = {RATE: {"low": 1e-3, "high": 0.1, "log": True}, LAYERS: [1, 2]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The board's files, and a prepared run of them; changed by no test."""
    folder = board.write(tmp_path_factory.mktemp("files"))
    prepare.run(board.config(folder), folder / "run")
    return folder


@pytest.fixture
def out(files, tmp_path):
    (tmp_path / "prepare").symlink_to(files / "run" / "prepare")
    return tmp_path


def settings(files, trials=3, space=SPACE, *more: str) -> Config:
    told = [f"tune.trials={trials}", f"tune.space={json.dumps(space)}", *more]
    return board.config(files, *told)


def trials_of(out) -> list[dict]:
    return json.loads(Artifact.load(out / "tune", "tune").file("trials.json").read_text())["trials"]


@pytest.fixture
def fake(monkeypatch):
    """Trainings that only follow a rule: what the search makes of them can be known beforehand."""
    return faked(monkeypatch)


def faked(monkeypatch) -> SimpleNamespace:
    told = SimpleNamespace(
        value=lambda config: 1 - abs(config.adapt.retrieval.learning_rate - 0.02),
        curve=lambda config, value: [value],
        trained=[],
    )

    def train(search, trial, values, folder):
        order = search.order(trial, values, folder)
        config = Config.parse(order["config"])
        told.trained.append(config)
        try:
            value = told.value(config)
            curve = told.curve(config, value)
            watch = Watch(search.study, trial)
            watch.set_params({"epochs": len(curve)})
            search.study.pruner = pruner_of(order)
            for epoch, one in enumerate(curve):
                watch.on_epoch_end(epoch, {"loss": 1.0, "ndcg@10": one})
        except optuna.TrialPruned:
            return {"state": "pruned"}
        except TfrecError as error:
            return {"state": "failed", "kind": type(error).__name__, "reason": str(error)}
        return {"state": "complete", "metrics": {"validation": value, "weights": 7}}

    monkeypatch.setattr(tune._Search, "train", train)
    return told


class TestSearch:
    @pytest.mark.slow
    def test_trial_0_is_the_configuration_as_it_is_and_the_best_is_ready_to_run(self, files, out):
        said: list[str] = []
        config = settings(files, 2, {RATE: [0.002, 0.05], LAYERS: [1]}, "seed=3")
        made = tune.run(config, out, say=said.append)
        first, second = trials_of(out)
        assert first["values"] == {RATE: 0.002, LAYERS: 1}
        assert first["value"] == made.metrics["validation_untuned"]

        (out / "alone").mkdir()
        (out / "alone" / "prepare").symlink_to(files / "run" / "prepare")
        plain = board.config(files, "seed=3", "adapt.refit=false")
        alone = adapt.run(plain, out / "alone", "retrieval")
        assert first["value"] == alone.metrics["validation"]

        best = max(first, second, key=lambda trial: trial["value"])
        assert made.metrics["best_trial"] == best["number"]
        ready = Config.load(str(made.file("best.toml")))
        assert ready.name == "files-tuned"
        assert ready.changed({"name": "files"}) == config.changed(best["values"])
        assert not list(out.glob(".tune.work/*/trial-*"))
        assert said[0] == "prepare: files"
        assert said[1].startswith("[1 of 2] trial 0: ")

    @pytest.mark.slow
    def test_the_ranker_is_tuned_by_the_whole_chain(self, files, out):
        more = ("tune.task=ranking", "adapt.refit=false", "adapt.retrieval.epochs=1")
        config = settings(files, 2, {"adapt.ranking.hidden": [4, 16]}, *more)
        made = tune.run(config, out, say=lambda _: None)
        retrieval = Artifact.load(out / "adapt" / "retrieval")
        assert made.parents["retrieval"] == retrieval.digest
        first, second = trials_of(out)
        # 8, the configuration's own, is not in the space, and is trial 0 all the same
        assert first["values"] == {"adapt.ranking.hidden": 8}
        assert second["values"]["adapt.ranking.hidden"] in (4, 16)
        assert 0 < first["value"] <= 1
        with pytest.raises(ConfigError, match=r"adapt\.ranking\.score is chosen on validation"):
            tune.run(config.changed({"adapt.ranking.score": {"click": 1.0}, **_tune(config)}), out)

    def test_it_comes_close_to_the_best(self, files, out, fake):
        made = tune.run(settings(files, 25, SPACE, "tune.pruner=none"), out, say=lambda _: None)
        best = trials_of(out)[made.metrics["best_trial"]]
        assert best["values"][RATE] == pytest.approx(0.02, rel=0.25)
        shares = json.loads(made.file("trials.json").read_text())["importance"]
        assert shares[RATE] > shares[LAYERS]
        assert sum(shares.values()) == pytest.approx(1)

    def test_the_same_seed_proposes_the_same_and_another_does_not(self, files, out, fake):
        def proposed(name: str, *more: str) -> list[dict]:
            (out / name).mkdir()
            (out / name / "prepare").symlink_to(files / "run" / "prepare")
            tune.run(settings(files, 8, SPACE, *more), out / name, say=lambda _: None)
            return [trial["values"] for trial in trials_of(out / name)]

        first = proposed("a")
        assert proposed("b") == first
        assert len({json.dumps(values) for values in first}) == 8
        other = proposed("c", "seed=2")
        assert other[0] == first[0]
        assert other[1:] != first[1:]

    def test_a_trial_differs_from_the_configuration_in_nothing_else(self, files, out, fake):
        config = settings(files, 2, SPACE, "tune.epochs=1", "adapt.retrieval.epochs=9")
        made = tune.run(config, out, say=lambda _: None)
        assert "at most 1 epochs, and the configuration says 9" in tune.summary(made)
        trial = fake.trained[1]
        own = {"adapt.refit": False, "adapt.retrieval.epochs": 1}
        assert trial == config.changed({**own, **trials_of(out)[1]["values"]})

    @pytest.mark.parametrize("task", ["retrieval", "ranking"])
    def test_the_task_s_own_space_can_be_set_and_holds_the_defaults(self, task):
        config = Config.parse({"tune": {"task": task, "space": tune.SPACES[task]}})
        for key, told in tune.SPACES[task].items():
            assert tune._holds(tune._distribution(config, key, told), config.at(key)), key

    def test_sizes_of_an_encoder_are_not_searched(self):
        config = Config.parse({"adapt": {"encoder": "pretrain"}})
        left = tune.SPACES["retrieval"].keys() - tune._usual_space(config).keys()
        assert left == {"adapt.retrieval.embedding_dim", "adapt.retrieval.layers"}


def _tune(config: Config) -> dict[str, object]:
    return {"tune": config.tune.model_dump()}


class TestGoingOn:
    def test_more_trials_are_added_as_if_asked_for_at_once(self, files, out, fake):
        few = tune.run(settings(files, 4), out, say=lambda _: None)
        assert len(fake.trained) == 4
        said: list[str] = []
        more = tune.run(settings(files, 9), out, say=said.append)
        assert len(fake.trained) == 9
        assert "4 trials are there already" in said
        assert (few.metrics["trials"], more.metrics["trials"]) == (4, 9)

        (out / "once").mkdir()
        (out / "once" / "prepare").symlink_to(files / "run" / "prepare")
        tune.run(settings(files, 9), out / "once", say=lambda _: None)
        assert [t["values"] for t in trials_of(out)] == [
            t["values"] for t in trials_of(out / "once")
        ]

    def test_what_is_done_is_not_done_again_unless_forced(self, files, out, fake):
        first = tune.run(settings(files, 2), out, say=lambda _: None)
        again = tune.run(settings(files, 2), out, say=lambda _: None)
        assert (again.created, again.digest, len(fake.trained)) == (first.created, first.digest, 2)
        assert tune.run(settings(files, 1), out, say=lambda _: None).metrics["trials"] == 2
        tune.run(settings(files, 2), out, force=True, say=lambda _: None)
        assert len(fake.trained) == 4

    def test_another_space_or_configuration_is_another_study(self, files, out, fake):
        tune.run(settings(files, 3), out, say=lambda _: None)
        for other in ({LAYERS: [1, 2]}, SPACE):
            said: list[str] = []
            more = ("adapt.retrieval.heads=4",) if other is SPACE else ()
            made = tune.run(settings(files, 2, other, *more), out, say=said.append)
            assert any("a new study" in line for line in said)
            assert made.metrics["trials"] == 2
        # and the first one is still there
        said = []
        assert tune.run(settings(files, 4), out, say=said.append).metrics["trials"] == 4
        assert "3 trials are there already" in said

    def test_no_trial_begins_when_the_time_is_over(self, files, out, fake, monkeypatch):
        clock = iter(range(0, 10_000, 100))
        monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        made = tune.run(settings(files, 50, SPACE, "tune.timeout=750"), out, say=lambda _: None)
        assert 1 <= made.metrics["trials"] < 5

    def test_ctrl_c_keeps_every_finished_trial_and_reports_them(self, files, out, fake):
        good = fake.value
        fake.value = lambda config: good(config) if len(fake.trained) < 4 else _interrupt()
        with pytest.raises(KeyboardInterrupt):
            tune.run(settings(files, 9), out, say=lambda _: None)
        before = trials_of(out)
        assert len(before) == 3
        fake.value = good
        tune.run(settings(files, 5), out, say=lambda _: None)
        after = trials_of(out)
        assert [t["number"] for t in after] == [0, 1, 2, 3, 4]
        assert after[:3] == before
        # the trial that was broken off is taken up again with its own values
        rates = [config.adapt.retrieval.learning_rate for config in fake.trained]
        assert rates[3] == rates[4]
        assert len(set(rates)) == 5

    def test_the_study_of_a_full_or_damaged_disk_says_where_it_is(self, files, out, fake):
        tune.run(settings(files, 1), out, say=lambda _: None)
        (database,) = out.glob(".tune.work/*/study.db")
        database.write_bytes(b"no database" * 500)
        with pytest.raises(SetupError, match=r"\.tune\.work cannot be read .*--force"):
            tune.run(settings(files, 2), out, say=lambda _: None)
        made = tune.run(settings(files, 2), out, force=True, say=lambda _: None)
        assert made.metrics["trials"] == 2


def _interrupt():
    raise KeyboardInterrupt


CODE = """
import sys
sys.path[:0] = {path!r}
import conftest, checkerboard as board
from pathlib import Path
from tfrec import cli
sys.exit(cli.main(["tune", "files", "--out", sys.argv[1],
    *(part for s in board.arguments(Path(sys.argv[2]), *sys.argv[3:]) for part in ("--set", s))]))
"""


def start(files, out, *more: str) -> subprocess.Popen:
    told = [f"tune.space={json.dumps(SPACE)}", "tune.pruner=none", *more]
    code = CODE.format(path=[p for p in sys.path if p])
    line = [sys.executable, "-c", code, str(out), str(files), *told]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env={**os.environ})


def wait_for(process, met) -> None:
    def goes_on() -> bool:
        assert process.poll() is None, process.communicate()
        return met()

    wait_until(goes_on)


def wait_until(met) -> None:
    deadline = time.monotonic() + 300
    while not met():
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.05)


def running() -> str:
    """The command lines of all processes."""
    return subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True).stdout


LONG = ("adapt.retrieval.epochs=15", "adapt.retrieval.patience=0")


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_trial_that_it_was_at(files, out):
    process = start(files, out, "tune.trials=2", *LONG)

    def second_trial_has_a_checkpoint() -> bool:
        found = out.glob(".tune.work/*/trial-1/adapt/.retrieval.work/*/select/state.json")
        return any(json.loads(state.read_text())["epoch"] >= 3 for state in found)

    wait_for(process, second_trial_has_a_checkpoint)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (file,) = out.glob(".tune.work/*/trial-1/adapt/.retrieval.work/*/select/state.json")
    stopped = json.loads(file.read_text())["epoch"]
    assert 3 <= stopped < 15
    assert not (out / "tune").exists()

    wait_until(lambda: str(out) not in running())  # the trial's own process has ended too
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "seconds": 1e6}))  # to be known again
    said: list[str] = []
    config = settings(files, 2, SPACE, "tune.pruner=none", *LONG)
    tune.run(config, out, say=said.append)
    assert "1 trials are there already" in said
    first, second = trials_of(out)
    assert first["values"] == {RATE: 0.002, LAYERS: 1}
    assert first["train_seconds"] < 1e6 < second["train_seconds"]
    assert [epoch for epoch, _ in second["curve"]][-1] == 15
    assert len(second["curve"]) >= 14  # the kill may fall between a checkpoint and its report
    assert not list(out.glob(".tune.work/*/worker-*"))


@pytest.mark.slow
def test_a_second_process_takes_other_trials_of_the_same_study(files, out):
    process = start(files, out, "tune.trials=2", "adapt.retrieval.epochs=5000", *LONG[1:])
    wait_for(process, lambda: list(out.glob(".tune.work/*/trial-0/adapt/.retrieval.work")))
    config = settings(files, 2, SPACE, "tune.pruner=none", "adapt.retrieval.epochs=5000", *LONG[1:])
    search = tune._Search.open(
        config,
        out,
        out / ".tune.work",
        {"dataset": Artifact.load(out / "prepare")},
        False,
        lambda _: None,
    )
    with search.at_work() as worker:
        trial, values = search.take(worker, False)
        assert trial.number == 1
        assert set(values) == set(SPACE)
        assert search.take(worker, False) is None
        with pytest.raises(InputError, match="trial 0, the configuration as it is, has not ended"):
            search.publish()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        # now that the other process is gone, its trial is there to be taken
        assert search.take(worker, False)[0].number == 0
        assert search.take(worker, False) is None


class TestTroubles:
    def test_a_trial_behind_the_others_is_ended_early(self, files, out, fake):
        poor = []

        def curve(config, value):
            poor.append(len(poor) >= 4)
            return [0.01 * poor[-1] + 0.1 * (not poor[-1]) + epoch / 1000 for epoch in range(20)]

        fake.curve = curve
        made = tune.run(
            settings(files, 6, SPACE, "adapt.retrieval.epochs=20"), out, say=lambda _: None
        )
        trials = trials_of(out)
        assert [t["state"] for t in trials] == ["complete"] * 4 + ["pruned"] * 2
        for trial in trials[4:]:
            assert trial["value"] is None
            assert trial["epochs"] < 20
            assert trial["reached"] == max(value for _, value in trial["curve"])
        assert made.metrics["pruned"] == 2
        assert made.metrics["best_trial"] < 4

    def test_hyperband_ends_trials_too_and_never_the_first(self, files, out, fake):
        fake.curve = lambda config, value: [0.9 - 0.1 * len(fake.trained)] * 27
        more = ("tune.pruner=hyperband", "adapt.retrieval.epochs=27")
        made = tune.run(settings(files, 8, SPACE, *more), out, say=lambda _: None)
        assert trials_of(out)[0]["state"] == "complete"
        assert made.metrics["pruned"] > 0

    @pytest.mark.slow
    def test_a_training_is_really_ended(self, files, out, monkeypatch):
        class Strict(optuna.pruners.BasePruner):
            def prune(self, study, trial):
                return True

        monkeypatch.setattr(one_trial, "pruner_of", lambda order: Strict())
        monkeypatch.setattr(tune, "_apart", lambda order, folder: one_trial.run(order))
        tune.run(settings(files, 2), out, say=lambda _: None)
        first, second = trials_of(out)
        assert (first["state"], first["epochs"]) == ("complete", 2)
        assert (second["state"], second["epochs"]) == ("pruned", 1)
        assert not list(out.glob(".tune.work/*/trial-*"))

    @pytest.mark.slow
    def test_a_bad_combination_fails_with_its_reason_and_the_search_goes_on(self, files, out):
        config = settings(files, 2, {"adapt.retrieval.heads": [3]})
        said: list[str] = []
        made = tune.run(config, out, say=said.append)
        first, second = trials_of(out)
        assert (first["state"], second["state"]) == ("complete", "failed")
        assert second["reason"].startswith("heads = 3 must divide the width 8")
        assert any(second["reason"] in line for line in said)
        assert made.metrics["best_trial"] == 0
        assert "No trial is better" in tune.summary(made)
        assert "must divide the width" in made.file("report.html").read_text()

    @pytest.mark.parametrize(
        ("error", "kind", "reason"),
        [
            (MemoryError(), "", "not enough memory"),
            (tf.errors.ResourceExhaustedError(None, None, "OOM when"), "", "not enough memory"),
            (tf.errors.InvalidArgumentError(None, None, "a shape\nlong"), "", "a shape"),
            (ValueError("no\nmore"), "", "ValueError: no"),
            (TrainingDivergedError("nan"), "TrainingDivergedError", "nan"),
            (SetupError("no space"), "SetupError", "no space"),
        ],
    )
    def test_every_failure_has_a_kind_and_a_reason(self, error, kind, reason, files, monkeypatch):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(adapt, "run", fail)
        config = board.config(files).dump()
        order = {"config": config, "task": "retrieval", "out": "x", "inputs": "x"}
        ending = one_trial.run(order)
        assert (ending["state"], ending["kind"]) == ("failed", kind)
        assert reason in ending["reason"]
        raised = tune._error_of(ending)
        known = kind in ("SetupError", "TrainingDivergedError")
        assert isinstance(raised, TfrecError) == known
        assert reason in str(raised)

    def test_a_trial_that_the_system_ends_has_failed(self, files, out, monkeypatch):
        kill = "import os, sys; os.kill(os.getpid(), 9)"
        fine = (
            "import json, sys; json.dump({'state': 'complete', 'metrics': {'validation': 0.5}}, "
            "open(sys.argv[1] + '/ending.json', 'w'))"
        )
        run = f"import sys\nexec({kill!r} if 'trial-1' in sys.argv[1] else {fine!r})"
        monkeypatch.setattr(tune, "_CHILD", (sys.executable, "-c", run))
        tune.run(settings(files, 3), out, say=lambda _: None)
        trials = trials_of(out)
        assert [t["state"] for t in trials] == ["complete", "failed", "complete"]
        assert "ended by SIGKILL; the system does so where memory" in trials[1]["reason"]

        monkeypatch.setattr(tune, "_CHILD", (sys.executable, "-c", kill))
        with pytest.raises(SetupError, match=r"the configuration as it is: .*SIGKILL"):
            tune.run(settings(files, 3, {LAYERS: [1, 2]}), out, say=lambda _: None)

    @pytest.mark.parametrize("error", [SetupError("no space"), ArtifactError("changed")])
    def test_what_would_fail_in_any_trial_ends_the_search(self, error, files, out, fake):
        good = fake.value

        def value(config):
            if len(fake.trained) == 2:
                raise error
            return good(config)

        fake.value = value
        with pytest.raises(type(error)):
            tune.run(settings(files, 3), out, say=lambda _: None)
        made = tune.run(settings(files, 3), out, say=lambda _: None)
        assert (made.metrics["complete"], len(fake.trained)) == (3, 4)

    def test_a_configuration_that_cannot_be_trained_ends_the_search(self, files, out, fake):
        def value(config):
            raise ConfigError("heads = 3 must divide")

        fake.value = value
        with pytest.raises(ConfigError, match="heads = 3"):
            tune.run(settings(files, 3), out, say=lambda _: None)
        assert len(fake.trained) == 1
        assert not (out / "tune").exists()

    def test_a_trial_in_which_process_after_process_dies_has_failed(self, files, out, fake):
        config = settings(files, 3)
        tune.run(config.changed({**_tune(config), "tune.trials": 1}), out, say=lambda _: None)
        told = {"dataset": Artifact.load(out / "prepare")}
        search = tune._Search.open(config, out, out / ".tune.work", told, False, lambda _: None)
        values = []
        for _ in range(tune.HOPELESS):
            with search.at_work() as worker:  # and ends without a word
                trial, taken = search.take(worker, False)
            assert trial.number == 1
            values.append(taken)
        assert values[0] == values[1] == values[2]
        tune.run(config, out, say=lambda _: None)
        trials = trials_of(out)
        assert [t["state"] for t in trials] == ["complete", "failed", "complete"]
        assert trials[1]["reason"].startswith("3 processes ended in it")

    def test_without_validation_events_there_is_nothing_to_tune_on(self, files, tmp_path):
        config = settings(files, 2, SPACE, "data.split=none")
        with pytest.raises(InputError, match="no validation events to tune on"):
            tune.run(config, tmp_path, say=lambda _: None)

    def test_several_workers_are_sent_away(self, files, out, monkeypatch):
        monkeypatch.setenv("TF_CONFIG", "{}")
        with pytest.raises(ConfigError, match="leave TF_CONFIG away"):
            tune.run(settings(files), out)


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("left")
    (out / "prepare").symlink_to(files / "run" / "prepare")
    space = {**SPACE, "adapt.retrieval.item_ids": [True, False], "adapt.text": ["none"]}
    space["adapt.retrieval.dropout"] = {"low": 0.0, "high": 0.5, "step": 0.25}
    with pytest.MonkeyPatch.context() as patch:
        fake = faked(patch)
        good = fake.value

        def value(config):
            if len(fake.trained) == 3:
                raise InputError("<b>bad</b>")
            return good(config)

        fake.value = value
        fake.curve = lambda config, value: [value / 2, value]
        config = settings(files, 12, space, "tune.pruner=none")
        return tune.run(config, out, say=lambda _: None)


class TestWhatIsLeft:
    def test_the_page_shows_every_trial_and_loads_nothing(self, made):
        page = made.file("report.html").read_text("utf-8")
        assert page.count("<svg") == 4
        assert "<b>bad</b>" not in page
        assert "&lt;b&gt;bad&lt;/b&gt;" in page
        for part in ("http://", "https://", "<script", "url(http"):
            assert part not in page.replace("http://www.w3.org", "")
        table = page.split("<h2>The trials</h2>")[1].split("</table>")[0]
        assert table.count("<tr") == 1 + 12
        assert "nan" not in page

    def test_the_table_is_complete(self, made):
        rows = list(csv.DictReader(made.file("trials.csv").read_text().splitlines()))
        trials = json.loads(made.file("trials.json").read_text())["trials"]
        assert [int(row["number"]) for row in rows] == list(range(12))
        for row, trial in zip(rows, trials, strict=True):
            assert row["state"] == trial["state"]
            assert float(row[RATE]) == trial["values"][RATE]
            assert row["value"] == ("" if trial["value"] is None else repr(trial["value"]))

    def test_the_summary_says_what_changed_and_how_far_to_trust_it(self, made):
        said = tune.summary(made)
        assert "12 trials: 11 complete, 1 failed" in said
        assert f"trial {made.metrics['best_trial']}" in said
        assert "(was 0.002)" in said
        assert "too high; the test events were not looked at" in said
        assert said.splitlines()[-1] == f"tfrec run {made.path / 'best.toml'}"

    def test_best_toml_is_the_best_trial(self, made, files):
        tree = json.loads(made.file("trials.json").read_text())
        best = Config.load(str(made.file("best.toml")))
        for key, value in tree["trials"][made.metrics["best_trial"]]["values"].items():
            assert best.at(key) == value
        assert best.tune == Config().tune
        assert best.data == settings(files).data


def test_a_study_s_folder_holds_no_pickle(files, out, fake):
    tune.run(settings(files, 2), out, say=lambda _: None)
    names = {path.name for path in Path(out).glob(".tune.work/*/*")}
    assert names == {"lock", "study.db"}
