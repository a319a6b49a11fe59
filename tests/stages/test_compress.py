"""compress: smaller models that are runs, what each costs and wins, and the choice among them."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import checkerboard as board
import numpy as np
import pytest
from tiny_bert import write_tiny_bert

from tfrec import cli, inspect
from tfrec.artifact import Artifact
from tfrec.config import Config
from tfrec.errors import ArtifactError, ConfigError, InputError
from tfrec.models.engine import load_recommender
from tfrec.models.int8 import holds
from tfrec.models.named import kernels
from tfrec.models.pruning import zeros_of
from tfrec.recommender import Request
from tfrec.report.proof import KNOWN, NEW, Budget
from tfrec.stages import compress, export, verify

pytestmark = pytest.mark.slow

FEW = (
    "compress.updates=3",
    "compress.tokens=64",
    "compress.warmup_steps=1",
    "compress.seconds=0.05",
)
ANY = Budget(loss=0.999)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A trained run with towers large enough to be pruned; changed by no test."""
    folder = tmp_path_factory.mktemp("compressed")
    write_tiny_bert(folder / "bert")
    settings = board.config(
        board.write(folder / "files"),
        f"adapt.text={folder / 'bert'}",
        "adapt.retrieval.embedding_dim=32",
        "adapt.retrieval.epochs=6",
        "adapt.retrieval.learning_rate=0.01",
        "adapt.ranking.hidden=64",
    )
    return board.train(folder / "run", settings)


@pytest.fixture(scope="module")
def run(untouched, tmp_path_factory):
    """A copy of it, that each test adds models to."""
    out = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(untouched, out, symlinks=True)
    return out


@pytest.fixture
def alone(monkeypatch):
    """Only the model that is asked for is made and measured, not those that stand beside it."""
    plans = compress._Job.plans
    monkeypatch.setattr(compress._Job, "plans", lambda job: plans(job)[-1:])


def config(*settings):
    return Config.load("files", ["evaluate.bootstrap=20", *FEW, *settings])


@pytest.fixture(scope="module")
def pruned(run):
    """The report on half of the weights pruned, and int8."""
    return compress.run(config("compress.prune=0.5"), run, ANY)


def tree_of(artifact):
    return json.loads(artifact.file("compress.json").read_text())


class TestPruned:
    def test_it_is_a_run_with_half_of_every_kernel_zero(self, run, pruned):
        made = load_recommender(run / "compress" / "pruned-0.5-int8")
        engine = made.engine
        for model in (engine.text_encoder, engine.two_tower, engine.ranker):
            shares = zeros_of(model)
            assert shares
            np.testing.assert_allclose(list(shares.values()), 0.5, atol=0.02)
        assert len(made.recommend([Request(history=("i2", "i4"))], k=5)[0]) == 5

    def test_its_vectors_are_those_its_models_give(self, run, pruned):
        made = load_recommender(run / "compress" / "pruned-0.5-int8")
        texts = made.catalog.texts
        np.testing.assert_allclose(made.engine.encode_text(texts[1:]), made.text[1:], atol=1e-5)
        rows = np.arange(len(texts), dtype=np.int32)
        found = made.engine.encode_candidate(made.text, made.catalog.features, rows)
        np.testing.assert_allclose(found[1:], made.vectors[1:], atol=1e-5)

    def test_it_is_exported_and_verified_as_any_run(self, run, pruned, tmp_path):
        out = tmp_path / "bundle"
        export.run(run / "compress" / "pruned-0.5-int8", out, saved_models=False)
        findings = verify.run(out)
        assert [finding for finding in findings if not finding.ok] == []

    def test_its_bundle_carries_what_was_measured(self, run, pruned, tmp_path):
        """Of the models that it was made from, and of itself."""
        made = export.run(run / "compress" / "pruned-0.5-int8", tmp_path / "b", saved_models=False)
        found = made.metrics
        for role in ("retrieval", "ranking"):
            before = Artifact.peek(run / "adapt" / role).metrics
            assert found[role]["source"]["validation"] == before["validation"]
        assert found["dataset"]["users"] == board.USERS
        (model,) = (m for m in tree_of(pruned)["models"] if m["key"] == "pruned-0.5-int8")
        assert found["compress"]["loss"] == model["loss"]
        assert found["compress"][KNOWN] == model["metrics"][KNOWN]["mean"]
        assert found["compress"]["kept"][KNOWN] == model["kept"][KNOWN]["mean"]
        assert found["compress"]["sizes"] == model["sizes"]
        assert "".join(inspect.describe(tmp_path / "b")).count("retrieval.source.validation") == 1
        told = json.loads((tmp_path / "b" / "manifest.json").read_text())["metrics"]
        assert told == found

    def test_a_report_from_before_the_model_is_not_carried(self, run, pruned, tmp_path):
        shutil.copytree(run / "compress", tmp_path / "compress", symlinks=True)
        for name in ("prepare", "adapt"):
            (tmp_path / name).symlink_to(run / name)
        path = tmp_path / "compress" / "report" / "manifest.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "created": "2000-01-01T00:00:00+00:00"}))
        source = tmp_path / "compress" / "pruned-0.5-int8"
        made = export.run(source, tmp_path / "b", saved_models=False)
        assert "compress" not in made.metrics
        assert "source" in made.metrics["retrieval"]

    def test_the_report_tells_what_was_measured(self, pruned):
        tree = tree_of(pruned)
        by_key = {model["key"]: model for model in tree["models"]}
        assert list(by_key) == ["float", "int8", "pruned-0.5-int8"]
        float_, int8, half = by_key.values()
        assert (float_["loss"], float_["cosine"], float_["neighbours"]) == (
            0,
            pytest.approx(1, abs=1e-5),
            1,
        )
        assert float_["kept"][KNOWN]["mean"] == float_["kept"][NEW]["mean"] == 1
        assert int8["sizes"]["text"] < float_["sizes"]["text"]
        assert half["sizes"]["text_gzip"] < int8["sizes"]["text_gzip"]
        for model in tree["models"]:
            assert model["sizes"]["bundle"] > model["sizes"]["text"] > 0
            kinds = ("one", "many", "query", "queries", "rank", "ranks", "request")
            assert set(model["times"]) == {"memory_mb", *(f"{name}_ms" for name in kinds)}
            assert model["sizes"]["bundle"] > model["sizes"]["bundle_gzip"] > 0
            assert min(model["times"].values()) > 0
            assert {KNOWN, NEW, "hr@10"} <= set(model["metrics"])
        assert half["zeros_of_all"] == pytest.approx(0.5, abs=0.02)
        assert {name.partition(".")[0] for name in half["zeros"]} == {"text", "towers", "ranker"}

    def test_the_page_and_the_table_name_every_model(self, pruned):
        page = pruned.file("report.html").read_text()
        table = compress.summary(pruned)
        for model in tree_of(pruned)["models"]:
            assert model["key"] in page
            assert model["key"] in table
        assert "<svg" in page
        assert "http" not in page.replace("http://www.w3.org", "")

    def test_again_trains_nothing(self, run, pruned, monkeypatch):
        monkeypatch.setattr(compress._Making, "_teach", None)
        again = compress.run(config("compress.prune=0.5"), run, ANY)
        assert again.config == pruned.config

    def test_other_settings_train_again(self, run, pruned, alone):
        before = Artifact.load(run / "compress" / "pruned-0.5-int8" / "adapt" / "retrieval")
        compress.run(config("compress.prune=0.5", "seed=2"), run, ANY)
        after = Artifact.load(run / "compress" / "pruned-0.5-int8" / "adapt" / "retrieval")
        assert before.digest != after.digest


@pytest.fixture(scope="module")
def learned(run):
    """The report on towers and a ranker that learned to be int8."""
    return compress.run(config("compress.qat=true", "compress.users=64"), run, ANY)


class TestLearningInt8:
    def test_kernels_of_towers_and_ranker_are_int8(self, run, learned):
        assert [model["key"] for model in tree_of(learned)["models"]] == [
            "float",
            "int8",
            "qat-int8",
        ]
        engine = load_recommender(run / "compress" / "qat-int8").engine
        before = load_recommender(run).engine
        for name in ("two_tower", "ranker"):
            found, old = kernels(getattr(engine, name)), kernels(getattr(before, name))
            assert found
            assert all(holds(kernel.numpy()) for kernel in found.values())
            assert not any(holds(kernel.numpy()) for kernel in old.values())

    def test_its_towers_are_exported_in_int8(self, run, learned, tmp_path):
        sizes = []
        for source in (run, run / "compress" / "qat-int8"):
            out = tmp_path / str(len(sizes))
            export.run(source, out, saved_models=False)
            assert [finding for finding in verify.run(out) if not finding.ok] == []
            sizes.append((out / "versions" / "1" / "litert" / "query.tflite").stat().st_size)
        assert sizes[1] < sizes[0]

    def test_it_is_for_int8(self, run):
        with pytest.raises(ConfigError, match=r"compress\.int8 = true"):
            compress.run(config("compress.qat=true", "compress.int8=false"), run)


def test_a_smaller_vocabulary_is_exported_with_its_tokenizer(run, tmp_path):
    made = compress.run(config("compress.vocabulary=88"), run, ANY)
    assert tree_of(made)["models"][-1]["key"] == "vocabulary-88-int8"
    sizes = {model["key"]: model["sizes"]["text"] for model in tree_of(made)["models"]}
    assert sizes["vocabulary-88-int8"] < sizes["int8"]
    out = tmp_path / "bundle"
    export.run(run / "compress" / "vocabulary-88-int8", out)
    assert [finding for finding in verify.run(out) if not finding.ok] == []


MIRRORED = """
import sys
from tfrec.models.keras_bridge import tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tfrec.config import Config
from tfrec.report.proof import Budget
from tfrec.stages import compress
found = Config.load("files", sys.argv[2:])
compress.run(found, sys.argv[1], Budget(loss=0.999))
"""


def test_two_devices_make_the_same_kind_of_model(untouched, tmp_path):
    shutil.copytree(untouched, tmp_path / "run", symlinks=True)
    told = config("compress.prune=0.5", "compress.qat=true", "compress.distribution=mirrored")
    settings = [
        f"{section}.{name}={json.dumps(value)}"
        for section in ("compress", "evaluate")
        for name, value in told.model_dump(mode="json")[section].items()
    ]
    asked = [sys.executable, "-c", MIRRORED, str(tmp_path / "run"), *settings]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = load_recommender(tmp_path / "run" / "compress" / "pruned-0.5-qat-int8")
    for model in (made.engine.text_encoder, made.engine.two_tower, made.engine.ranker):
        np.testing.assert_allclose(list(zeros_of(model).values()), 0.5, atol=0.02)
    for model in (made.engine.two_tower, made.engine.ranker):
        assert all(holds(kernel.numpy()) for kernel in kernels(model).values())
    assert len(made.recommend([Request(history=("i2", "i4"))], k=5)[0]) == 5


def test_a_training_that_was_killed_goes_on(untouched, tmp_path, monkeypatch, alone):
    wanted = config("compress.prune=0.5", 'compress.parts=["text"]', "compress.epochs=3")
    made = []
    for name, kill in (("whole", False), ("killed", True)):
        shutil.copytree(untouched, tmp_path / name, symlinks=True)
        if kill:
            saved = compress.save

            def dies(*arguments):
                raise KeyboardInterrupt

            monkeypatch.setattr(compress, "save", dies)
            with pytest.raises(KeyboardInterrupt):
                compress.run(wanted, tmp_path / name, ANY)
            assert list((tmp_path / name / "compress").glob(".*.work/*/text-*/state.json"))
            monkeypatch.setattr(compress, "save", saved)
        compress.run(wanted, tmp_path / name, ANY)
        made.append(load_recommender(tmp_path / name / "compress" / "pruned-0.5-int8"))
    np.testing.assert_array_equal(made[0].vectors, made[1].vectors)
    assert not list((tmp_path / "killed" / "compress").glob(".*.work"))


class TestBudget:
    def test_without_a_way_the_usual_ones_are_tried(self, run, capsys):
        code = cli.main(
            [
                "compress",
                str(run),
                *(part for setting in FEW for part in ("--set", setting)),
                "--set",
                "evaluate.bootstrap=20",
                "--max-loss",
                "99%",
                "--max-size",
                "30MB",
            ]
        )
        told = capsys.readouterr().out
        assert code == 0
        tree = tree_of(Artifact.load(run / "compress" / "report"))
        assert [model["key"] for model in tree["models"]] == [
            "float",
            "int8",
            "pruned-0.5-int8",
            "heads-1-neurons-32-int8",
            "student-1x32-int8",
            "student-1x16-int8",
        ]
        assert tree["chosen"] in told
        assert f"tfrec export {run}" in told
        sizes = {model["key"]: model["sizes"]["text"] for model in tree["models"]}
        assert sizes["student-1x16-int8"] < sizes["student-1x32-int8"] < sizes["int8"]

    def test_one_that_cannot_be_met_names_the_nearest(self, run, capsys):
        code = cli.main(
            [
                "compress",
                str(run),
                "--layers",
                "1",
                *(part for setting in FEW for part in ("--set", setting)),
                "--max-size",
                "1kB",
            ]
        )
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == cli.BAD_INPUT
        assert "no model keeps within the budget; the nearest is student-1x32-int8" in told
        assert "where 1 kB is asked" in told
        assert (run / "compress" / "report" / "report.html").is_file()


class TestBadInput:
    def test_no_run(self, tmp_path):
        with pytest.raises(ArtifactError, match="prepare"):
            compress.run(config(), tmp_path / "nothing")

    @pytest.mark.parametrize(
        ("setting", "why"),
        [
            ("compress.heads=3", "heads = 3 is not possible"),
            ("compress.layers=9", "layers = 9 is not possible"),
            ("compress.width=24", "width = 24"),
            ("compress.vocabulary=9", "80 are single characters"),
        ],
    )
    def test_a_shape_that_is_not_possible(self, run, setting, why):
        with pytest.raises(ConfigError, match=why):
            compress.run(config(setting), run)

    def test_a_bert_with_adapters(self, tmp_path_factory, tmp_path):
        shutil.copytree(board.tuned(tmp_path_factory, "adapter"), tmp_path / "run")
        with pytest.raises(InputError, match=r"tuning\.text = adapter"):
            compress.run(config("compress.prune=0.5"), tmp_path / "run")

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--max-loss", "lots"),
            ("--max-loss", "150%"),
            ("--max-size", "30"),
            ("--max-latency", "3 parsecs"),
            ("--student", "small"),
        ],
    )
    def test_words_that_are_no_bounds(self, run, option, value, capsys):
        with pytest.raises(SystemExit) if option != "--student" else nullcontext():
            assert cli.main(["compress", str(run), option, value]) == cli.BAD_INPUT
        assert value in capsys.readouterr().err


def test_a_lora_tuned_bert_is_taken_with_its_changes(tmp_path_factory, tmp_path, alone):
    shutil.copytree(board.tuned(tmp_path_factory, "lora"), tmp_path / "run")
    compress.run(config("compress.layers=1"), tmp_path / "run", ANY)
    made = load_recommender(tmp_path / "run" / "compress" / "student-1x32-int8")
    assert int(made.engine.text_encoder.model.num_layers) == 1
    found = made.engine.encode_text(made.catalog.texts[1:])
    np.testing.assert_allclose(found, made.text[1:], atol=1e-5)


def test_a_run_without_texts_is_pruned(tmp_path):
    settings = board.config(
        board.write(tmp_path / "files"),
        "adapt.retrieval.embedding_dim=32",
        "adapt.ranking.hidden=64",
    )
    board.train(tmp_path / "run", settings)
    made = compress.run(config("compress.prune=0.5"), tmp_path / "run", ANY)
    assert [model["key"] for model in tree_of(made)["models"]] == [
        "float",
        "int8",
        "pruned-0.5-int8",
    ]
    with pytest.raises(ConfigError, match=r"compress\.heads is of a text encoder"):
        compress.run(config("compress.heads=1"), tmp_path / "run")
