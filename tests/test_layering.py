"""What the import contracts cannot see: what a process has really loaded."""

import subprocess
import sys
import typing
from pathlib import Path

import tfrec

PACKAGE = Path(tfrec.__file__).parent
HEAVY = (
    *("tensorflow", "tf_keras", "keras", "scipy", "implicit", "matplotlib", "pandas", "sklearn"),
    "optuna",
)
LIGHT = [
    *("tfrec.artifact", "tfrec.cli", "tfrec.config", "tfrec.errors", "tfrec.index"),
    *("tfrec.inspect", "tfrec.metrics", "tfrec.recommender", "tfrec.stages.prepare"),
    *(f"tfrec.data.{path.stem}" for path in (PACKAGE / "data").glob("[a-z]*.py")),
]


def test_the_base_install_loads_nothing_that_only_training_needs():
    code = (
        f"import importlib, sys\nfor name in {LIGHT}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_public_name_can_be_had():
    assert sorted(tfrec.__all__) == dir(tfrec)
    for name in tfrec.__all__:
        assert getattr(tfrec, name) is not None, name


def test_what_a_recommender_takes_and_gives_is_public():
    hints = typing.get_type_hints(tfrec.Recommender.recommend)
    assert typing.get_args(hints["requests"]) == (tfrec.Request,)
    (answer,) = typing.get_args(hints["return"])
    assert typing.get_args(answer) == (tfrec.Recommended,)


def test_no_module_reads_or_writes_pickles():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        for way in ("import pickle", "pickle.load", "joblib", "allow_pickle=True", "dill"):
            assert way not in text, path
