"""The command line: what it answers, how fast, and how each kind of ending looks."""

import argparse
import errno
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import tfrec
from tfrec import artifact, cli
from tfrec.config import TuningMethod
from tfrec.errors import ArtifactError, ConfigError, InputError, SetupError

HEAVY = ("tensorflow", "tf_keras", "keras", "numpy", "pyarrow", "pydantic", "scipy", "tqdm")


def command(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tfrec.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **settings,
    )


def verbs(
    parser: argparse.ArgumentParser | None = None,
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser below the root, by its full name."""
    parser = parser or cli.parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield child.prog, child
                yield from verbs(child)


def one_line(text: str) -> str:
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text.rstrip("\n")


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a command whose work raises ``error``."""
    from tfrec.data import sources

    def fail() -> None:
        raise error

    monkeypatch.setattr(sources, "listing", fail)
    return cli.main(["data", "list"])


class TestHelp:
    def test_answers_in_half_a_second(self):
        def seconds() -> float:
            start = time.perf_counter()
            assert command("--help").returncode == 0
            return time.perf_counter() - start

        assert min(seconds() for _ in range(5)) < 0.5

    def test_loads_the_standard_library_alone(self):
        report = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "tfrec.cli", "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in report.splitlines()}
        assert loaded.isdisjoint(HEAVY)

    def test_importing_tfrec_loads_the_standard_library_alone(self):
        code = f"import sys, tfrec; print([m for m in {HEAVY} if m in sys.modules])"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert answer.stdout.strip() == "[]"

    @pytest.mark.parametrize("name", [name for name, _ in verbs()])
    def test_every_verb_shows_examples_that_its_parser_accepts(self, name):
        text = dict(verbs())[name].format_help()
        examples = re.findall(r"^  (tfrec .*)$", text, re.M)
        assert examples
        for example in examples:
            assert cli.parser().parse_args(shlex.split(example)[1:]).handler

    def test_every_option_says_what_it_does(self):
        silent = [
            (name, action.dest)
            for name, parser in verbs()
            for action in parser._actions
            if not action.help and not isinstance(action, argparse._SubParsersAction)
        ]
        assert silent == []

    def test_version_is_that_of_the_package(self, capsys):
        with pytest.raises(SystemExit) as done:
            cli.main(["--version"])
        assert done.value.code == 0
        assert capsys.readouterr().out == f"tfrec {tfrec.__version__}\n"


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ([], "VERB"),
            (["rnu"], "'rnu'"),
            (["run"], "CONFIG"),
            (["run", "files", "--sett", "a=b"], "--sett"),
            (["run", "files", "--seed", "one"], "'one'"),
            (["adapt", "files"], "--task"),
            (["adapt", "files", "--task", "sorting"], "'sorting'"),
            (["recommend", "DIR", "--user", "1", "--k", "0"], "'0'"),
            (["recommend", "DIR", "--user", "1", "--filter", "genre"], "'genre'"),
            (["data", "get"], "'get'"),
        ],
    )
    def test_a_wrong_one_ends_with_2_and_one_line_that_names_it(self, arguments, named, capsys):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 2
        assert named in one_line(capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            (["movielens-100"], "did you mean 'movielens-100k'"),
            (["nowhere.toml"], "nowhere.toml"),
            (["files", "--set", "data.intractions=a.csv"], "did you mean 'interactions'"),
            (["files", "--set", "adapt.epochs=0"], "epochs"),
            (["files", "--set", "adapt.epochs"], "section.key=value"),
            (["files"], "data.interactions"),
            (["files", "--set", "data.interactions=nowhere.csv"], "nowhere.csv"),
            (["movielens-1m", "--data-dir", "nowhere"], "nowhere"),
        ],
    )
    def test_bad_configuration_ends_with_2_and_leaves_nothing(
        self, arguments, answer, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["prepare", *arguments, "--out", "run"]) == 2
        printed = capsys.readouterr()
        assert answer in one_line(printed.err)
        assert list(tmp_path.rglob("*")) == []


class TestStages:
    @pytest.fixture
    def calls(self, monkeypatch) -> list[tuple]:
        """Stage modules that only record how they are called."""
        calls: list[tuple] = []

        def record(name):
            def run(config, out, *rest, force=False):
                calls.append((name, config, out, rest, force))
                return types.SimpleNamespace(path=out / name, kind="report")

            return run

        for package, names in (
            ("tfrec", ["pipeline"]),
            ("tfrec.stages", ["prepare", "adapt", "evaluate"]),
        ):
            for name in names:
                module = types.ModuleType(f"{package}.{name}")
                module.run = record(name)
                module.summary_lines = lambda found: ["a summary"]
                module.summary = lambda found: "a summary"
                monkeypatch.setitem(sys.modules, f"{package}.{name}", module)
                monkeypatch.setattr(importlib.import_module(package), name, module, raising=False)
        return calls

    @pytest.mark.parametrize(
        ("verb", "name", "rest", "printed"),
        [
            (["run"], "pipeline", (), "saved_models/movielens-100k"),
            (["prepare"], "prepare", (), "saved_models/movielens-100k/prepare"),
            (["evaluate"], "evaluate", (), "saved_models/movielens-100k/evaluate"),
            (["adapt", "--task", "retrieval"], "adapt", ("retrieval",), "adapt"),
            (["adapt", "--task", "ranking"], "adapt", ("ranking",), "adapt"),
        ],
    )
    def test_a_verb_calls_its_stage_and_prints_where_the_artifact_is(
        self, verb, name, rest, printed, calls, capsys
    ):
        assert cli.main([*verb, "movielens-100k"]) == 0
        ((called, config, out, given, force),) = calls
        assert (called, given, force) == (name, rest, False)
        assert out == Path("saved_models/movielens-100k")
        assert config.data.source == "movielens-100k"
        printed_lines = capsys.readouterr().out.splitlines()
        assert printed_lines[-1].endswith(printed)
        assert printed_lines[:-1] == ([] if name == "adapt" else ["a summary"])

    @pytest.mark.parametrize(
        ("task", "tasks"),
        [
            ("ranking", ["like"]),
            ("multitask", []),
            ("rating", ["rating"]),
            ("click", ["click"]),
        ],
    )
    def test_a_task_of_the_ranker_sets_what_it_predicts(self, task, tasks, calls):
        line = f"adapt movielens-100k --set adapt.ranking.tasks=[like] --task {task}"
        assert cli.main(line.split()) == 0
        ((_, config, _, given, _),) = calls
        assert given == ("ranking",)
        assert config.adapt.ranking.tasks == tasks

    @pytest.mark.parametrize(
        ("rest", "expected"),
        [
            ([], ("head", "full")),
            (["--tune", "lora"], ("lora", "lora")),
            (["--tune", "adapter", "--set", "adapt.tuning.behaviour=full"], ("adapter", "full")),
        ],
    )
    def test_tune_sets_both_methods_and_a_setting_beside_it_wins(self, rest, expected, calls):
        assert cli.main(["adapt", "files", "--task", "retrieval", *rest]) == 0
        tuning = calls[0][1].adapt.tuning
        assert (tuning.text, tuning.behaviour) == expected

    def test_the_methods_of_tune_are_those_of_the_configuration(self):
        action = next(a for a in dict(verbs())["tfrec adapt"]._actions if a.dest == "tune")
        assert set(action.choices) == set(get_args(TuningMethod))

    def test_options_reach_the_configuration(self, calls, tmp_path):
        line = "run files --set adapt.epochs=7 --set evaluate.k=[3,4] --seed 5 --data-dir 1e3"
        cli.main([*line.split(), "--out", str(tmp_path), "--force"])
        ((_, config, out, _, force),) = calls
        assert (config.adapt.retrieval.epochs, config.evaluate.k, config.seed) == (7, [3, 4], 5)
        assert (config.data.data_dir, out, force) == ("1e3", tmp_path, True)


class TestRecommend:
    @pytest.fixture
    def asked(self, monkeypatch) -> dict[str, object]:
        import tfrec.stages

        asked: dict[str, object] = {}
        module = types.ModuleType("tfrec.stages.recommend")
        module.run = lambda folder, **request: asked.update(folder=folder, **request)
        monkeypatch.setitem(sys.modules, "tfrec.stages.recommend", module)
        monkeypatch.setattr(tfrec.stages, "recommend", module, raising=False)
        return asked

    def test_the_whole_request_reaches_the_stage(self, asked, tmp_path, capsys):
        out = tmp_path / "recs.jsonl"
        line = (
            """recommend DIR --user 7 --user 'x y' --users u.csv --k 3 --history '1, "a,b",c' """
            "--profile 'likes tea' --exclude 4,5 --exclude 6 --include 7 --filter genre=Drama "
            "--filter genre=War --filter year=1994 --include-seen"
        )
        code = cli.main([*shlex.split(line), "--out", str(out)])
        assert code == 0
        assert asked == {
            "folder": Path("DIR"),
            "users_file": Path("u.csv"),
            "user_ids": ["7", "x y"],
            "history": ["1", "a,b", "c"],
            "profile": "likes tea",
            "exclude": ["4", "5", "6"],
            "include": ["7"],
            "filters": {"genre": ["Drama", "War"], "year": ["1994"]},
            "include_seen": True,
            "k": 3,
            "out": out,
            "format": "jsonl",
        }
        assert capsys.readouterr().out == f"{out}\n"

    def test_what_is_not_given_is_left_to_the_run(self, asked):
        assert cli.main(["recommend", "DIR", "--user", "7"]) == 0
        nothing = {"users_file", "history", "profile", "include_seen", "k", "out"}
        assert {name for name, value in asked.items() if value is None} == nothing
        assert (asked["format"], asked["filters"]) == ("csv", {})
        assert cli.main(["recommend", "DIR", "--user", "7", "--no-include-seen"]) == 0
        assert asked["include_seen"] is False

    def test_an_empty_history_is_a_request(self, asked):
        assert cli.main(["recommend", "DIR", "--history", "", "--profile", ""]) == 0
        assert asked["history"] == []

    def test_nobody_to_recommend_for_is_an_error(self, asked, capsys):
        assert cli.main(["recommend", "DIR"]) == 2
        assert "--users" in one_line(capsys.readouterr().err)
        assert asked == {}


class TestEndings:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (InputError("line 3 has no user"), 2),
            (ConfigError("k = 0"), 2),
            (ArtifactError("unfinished"), 2),
            (SetupError("no network"), 3),
            (OSError(errno.ENOSPC, "full", "big.bin"), 3),
            (PermissionError(errno.EACCES, "no", "secret.bin"), 3),
            (MemoryError(), 3),
            (ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow"), 3),
            (KeyboardInterrupt(), 130),
            (ZeroDivisionError("division by zero"), 1),
            (ModuleNotFoundError("No module named 'tfrec.nix'", name="tfrec.nix"), 1),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
    )
    def test_each_has_its_code_and_one_line(self, error, code, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.delenv("TFREC_DEBUG", raising=False)
        assert ending(monkeypatch, error) == code
        line = one_line(capsys.readouterr().err)
        assert line.startswith("tfrec: ")
        if str(error) and code == 2:
            assert str(error) in line

    def test_a_bug_names_the_file_that_holds_its_traceback(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.delenv("TFREC_DEBUG", raising=False)
        ending(monkeypatch, ZeroDivisionError("division by zero"))
        line = one_line(capsys.readouterr().err)
        (log,) = tmp_path.iterdir()
        assert str(log) in line
        assert "bug of tfrec" in line
        assert "raise error\nZeroDivisionError: division by zero" in log.read_text()

    def test_with_debugging_the_traceback_is_printed(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setenv("TFREC_DEBUG", "1")
        assert ending(monkeypatch, InputError("line 3 has no user")) == 2
        assert "Traceback" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_behind_the_output_ends_with_3(self, full_device):
        with full_device.open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "tfrec.cli", "data", "list"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 3
        assert "no space left" in one_line(done.stderr)

    def test_a_reader_that_went_away_is_no_error_to_talk_about(self):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "tfrec.cli", "data", "list"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")

    def test_ctrl_c_ends_with_130_and_one_line(self):
        code = (
            "import sys, time; from tfrec import cli; from tfrec.data import sources\n"
            "def work(): print('working', flush=True); time.sleep(60)\n"
            "sources.listing = work; sys.exit(cli.main(['data', 'list']))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "interrupted" in one_line(err)


class TestData:
    def test_list_names_every_source(self, capsys):
        from tfrec.data import sources

        assert cli.main(["data", "list"]) == 0
        printed = capsys.readouterr().out
        assert [line.split()[0] for line in printed.splitlines()] == [*sources.names(), "files"]

    def test_fetch_checks_a_folder_that_is_given(self, shared_data, capsys):
        folder = shared_data / "ml-100k"
        assert cli.main(["data", "fetch", "movielens-100k", "--data-dir", str(folder)]) == 0
        assert capsys.readouterr().out == f"{folder}\n"

    def test_fetch_of_an_unknown_name_says_the_nearest(self, capsys):
        assert cli.main(["data", "fetch", "movielens-100"]) == 2
        assert "did you mean 'movielens-100k'" in one_line(capsys.readouterr().err)


class TestInspect:
    @pytest.fixture
    def run(self, tmp_path) -> Path:
        config = {"data": {"source": "movielens-1m", "k_core": 0}, "inputs": {"u.data": "abc"}}
        with artifact.writing(tmp_path / "prepare", kind="dataset", config=config) as draft:
            (draft.path / "events.bin").write_bytes(bytes(1500))
            draft.metrics["users"] = 6040
        parent = artifact.Artifact.load(tmp_path / "prepare")
        with artifact.writing(
            tmp_path / "adapt" / "retrieval",
            kind="retrieval",
            config={"seed": 1},
            parents={"dataset": parent},
        ) as draft:
            draft.metrics["ndcg@10"] = 0.123456789
        return tmp_path

    def test_shows_what_there_is_to_know(self, run, capsys):
        assert cli.main(["inspect", str(run / "prepare")]) == 0
        printed = capsys.readouterr().out
        for fact in (": dataset", f"tfrec {tfrec.__version__}", "1.5 kB  events.bin", "6040"):
            assert fact in printed
        assert re.search(r"^ +data\.source +movielens-1m$", printed, re.M)
        assert re.search(r"^ +inputs\.u\.data +abc$", printed, re.M)
        assert "k_core" not in printed

    def test_shows_every_artifact_of_a_run_and_its_parents(self, run, capsys):
        (run / ".half.partial").mkdir()
        (run / ".half.partial" / "manifest.json").write_text("{")
        assert cli.main(["inspect", str(run)]) == 0
        printed = capsys.readouterr().out
        parent = artifact.Artifact.peek(run / "prepare").digest
        assert re.search(rf"^  parent +dataset {parent}$", printed, re.M)
        assert "0.123457" in printed
        assert "seed" not in printed

    def test_names_the_settings_of_a_recipe_that_leaves_out_the_outer_sections(
        self, tmp_path, capsys
    ):
        recipe = {"ranking": {"epochs": 9, "hidden": 64, "score": {"click": 2.0}}, "seed": None}
        with artifact.writing(tmp_path / "a", kind="ranking", config=recipe):
            pass
        assert cli.main(["inspect", str(tmp_path / "a")]) == 0
        printed = capsys.readouterr().out
        shown = re.findall(r"^    (\S+) +(\S+)$", printed, re.M)
        assert shown == [("adapt.ranking.epochs", "9"), ("adapt.ranking.score.click", "2")]

    def test_a_changed_byte_is_an_error(self, run, capsys):
        (run / "prepare" / "events.bin").write_bytes(bytes(1499) + b"x")
        assert cli.main(["inspect", str(run)]) == 2
        assert "events.bin" in one_line(capsys.readouterr().err)

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_a_folder_without_an_artifact_is_an_error(self, name, tmp_path, capsys):
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert str(tmp_path) in one_line(capsys.readouterr().err)


class TestDoctor:
    @pytest.mark.parametrize(
        ("findings", "code"),
        [([("ok", "Python"), ("warn", "no GPU")], 0), ([("fail", "disk"), ("ok", "Python")], 3)],
    )
    def test_ends_with_3_only_if_something_is_broken(self, findings, code, monkeypatch, capsys):
        module = types.ModuleType("tfrec.doctor")
        module.diagnose = lambda dataset: iter(findings)
        monkeypatch.setitem(sys.modules, "tfrec.doctor", module)
        monkeypatch.setattr(tfrec, "doctor", module, raising=False)
        assert cli.main(["doctor"]) == code
        lines = capsys.readouterr().out.splitlines()
        assert [tuple(line.split(maxsplit=1)) for line in lines] == findings


class TestKeys:
    @pytest.fixture
    def keys(self, tmp_path, capsys):
        """Runs `tfrec keys ...` on a file of its own; gives the exit code and what was written."""

        def run(*arguments: str) -> tuple[int, str, str]:
            code = cli.main(["keys", *arguments, "--file", str(tmp_path / "keys.json")])
            return code, *capsys.readouterr()

        return run

    def test_a_key_is_printed_alone_so_that_a_script_can_take_it(self, keys, tmp_path):
        from tfrec.serving.keys import Keys

        code, out, told = keys("create", "--role", "read", "--label", "shop")
        assert code == 0
        found = Keys(tmp_path / "keys.json").find(one_line(out))
        assert (found.role, found.label) == ("read", "shop")
        assert "not shown again" in one_line(told)

    def test_the_list_has_everything_but_the_keys(self, keys):
        made = [keys("create", "--role", role, "--label", "x y")[1] for role in ("read", "admin")]
        code, out, _ = keys("list")
        assert code == 0
        assert [line.split()[1] for line in out.splitlines()] == ["read", "admin"]
        assert all(line.endswith("  x y") for line in out.splitlines())
        assert not any(token.strip() in out for token in made)

    def test_a_revoked_key_is_gone(self, keys):
        keys("create", "--role", "write")
        key_id = keys("list")[1].split()[0]
        assert keys("revoke", key_id)[:2] == (0, f"revoked {key_id}  write\n")
        assert keys("list")[1] == ""

    @pytest.mark.parametrize("arguments", [["list"], ["revoke", "abc"]])
    def test_a_file_that_is_not_there_is_no_list(self, keys, arguments):
        code, _, told = keys(*arguments)
        assert code == 2
        assert "`tfrec keys create` makes one" in one_line(told)

    def test_an_unknown_id_is_named(self, keys):
        keys("create", "--role", "read")
        code, _, told = keys("revoke", "abc")
        assert code == 2
        assert "has no key 'abc'" in one_line(told)
