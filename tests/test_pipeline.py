"""run: the stages in order, and only those that are needed."""

from types import SimpleNamespace

import pytest

from tfrec import pipeline
from tfrec.artifact import writing
from tfrec.config import Config
from tfrec.errors import ConfigError


@pytest.fixture
def calls(monkeypatch):
    """Stages that only record that they were called; what ``prepare`` finds is settable."""
    calls: list = []
    split = {"train": 5, "valid": 1, "test": 1}

    def stage(name):
        def run(config, out, *task, force=False):
            calls.append((name, *task, force))
            return SimpleNamespace(kind=name, metrics={"split": split}, path=out / name)

        return run

    for name in ("prepare", "adapt", "evaluate"):
        monkeypatch.setattr(getattr(pipeline, name), "run", stage(name))
    monkeypatch.setattr(pipeline.prepare, "summary_lines", lambda _: ["a summary"])
    return SimpleNamespace(made=calls, split=split)


def config(**tree) -> Config:
    return Config.parse({"name": "tiny", **tree})


def test_every_stage_comes_once_in_order(calls, tmp_path):
    last = pipeline.run(config(), tmp_path / "run", say=lambda _: None)
    assert last.kind == "evaluate"
    assert calls.made == [
        ("prepare", False),
        ("adapt", "retrieval", False),
        ("adapt", "ranking", False),
        ("evaluate", False),
    ]


def test_force_reaches_every_stage(calls, tmp_path):
    pipeline.run(config(), tmp_path / "run", force=True, say=lambda _: None)
    assert all(call[-1] for call in calls.made)


@pytest.mark.parametrize("split", [{"train": 5}, {"train": 5, "test": 0}])
def test_nothing_is_evaluated_where_nothing_is_held_out(calls, tmp_path, split):
    calls.split.clear()
    calls.split.update(split)
    last = pipeline.run(config(), tmp_path, say=lambda _: None)
    assert last.kind == "adapt"
    assert [call[0] for call in calls.made] == ["prepare", "adapt", "adapt"]


def test_it_says_where_it_is(calls, tmp_path):
    said: list[str] = []
    pipeline.run(config(), tmp_path, say=said.append)
    assert said == [
        "prepare: files",
        "  a summary",
        "adapt: retrieval",
        "adapt: ranking",
        "evaluate",
    ]


def test_another_worker_prepares_and_evaluates_nothing_and_says_nothing(
    calls, tmp_path, monkeypatch
):
    second = SimpleNamespace(chief=False, from_chief=lambda value: value)
    monkeypatch.setattr(pipeline, "place", lambda _: second)
    for folder, kind in (("prepare", "dataset"), ("evaluate", "report")):
        with writing(tmp_path / folder, kind=kind, config={}) as draft:
            draft.metrics["split"] = calls.split
    said: list[str] = []
    last = pipeline.run(config(), tmp_path, say=said.append)
    assert last.kind == "report"
    assert [call[0] for call in calls.made] == ["adapt", "adapt"]
    assert said == []


def test_data_that_cannot_be_read_leaves_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.interactions"):
        pipeline.run(config(), tmp_path / "run", say=lambda _: None)
    assert not any((tmp_path / "run").rglob("*.json"))
