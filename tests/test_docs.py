"""The documents say what the code does: keys, defaults, options, commands, files, codes."""

import argparse
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydantic import BaseModel

from tfrec import cli
from tfrec.config import Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("saved_models/*.md")])
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def commands() -> Iterator[tuple[str, str]]:
    """Page and line of every tfrec command that a page shows on a line of its own."""
    for page in PAGES:
        for line in page.read_text("utf-8").splitlines():
            command = line.strip().removeprefix("$ ")
            if re.match(r"tfrec [a-z-]", command) and not re.search("…|[|] ", command):
                yield page.name, command


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]
    return [r for r in map(Requirement, named) if r.name != "tfrec"]


def defaults(section: BaseModel, path: str = "") -> Iterator[tuple[str, object]]:
    """Path -> default of each key, as plain values."""
    for key, value in section.model_dump(mode="json").items():
        inner = getattr(section, key)
        if isinstance(inner, BaseModel):
            yield from defaults(inner, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def headings(page: Path) -> set[str]:
    """What follows the # of a link to a heading."""
    lines = [line for line in page.read_text("utf-8").splitlines() if re.match("#+ ", line)]
    return {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines}


class TestGeneratedPages:
    def test_are_current(self):
        spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
        generate = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(generate)
        stale = [path.name for path, text in generate.pages().items() if path.read_text() != text]
        assert stale == [], "make docs"

    def test_document_every_key_with_its_real_default(self):
        page = (ROOT / "docs" / "configuration.md").read_text("utf-8").replace(r"\|", "\0")
        rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
        documented = {row[1].strip(" `"): row[3].strip().replace("\0", "|") for row in rows}
        real = dict(defaults(Config()))
        assert set(documented) == set(real)
        for key, text in documented.items():
            shown = None if text == "not set" else json.loads(text.strip("`"))
            assert shown == real[key], key


class TestCommands:
    def test_every_option_is_in_a_page(self):
        text = "\n".join(page.read_text("utf-8") for page in PAGES)

        def options(parser: argparse.ArgumentParser) -> Iterator[str]:
            for action in parser._actions:
                yield from action.option_strings
                if isinstance(action, argparse._SubParsersAction):
                    for child in action.choices.values():
                        yield from options(child)

        wanted = {name for name in options(cli.parser()) if name not in ("-h", "--help")}
        assert {name for name in wanted if name not in text} - {"--version"} == set()

    @pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
    def test_shown_ones_are_accepted(self, page, command):
        assert cli.parser().parse_args(words(command)).handler

    @pytest.mark.parametrize(
        "command", sorted({line for page, line in commands() if page == "README.md"})
    )
    def test_settings_that_the_readme_shows_are_known(self, command):
        given = cli.parser().parse_args(words(command))
        assert Config.load("files", getattr(given, "settings", []))

    def test_python_that_the_readme_shows_compiles_and_its_settings_are_known(self):
        (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
        compile(block, "README.md", "exec")
        arguments = re.search(r"Config\.load\((.*)\)", block).group(1)
        assert Config.load(*eval(f"({arguments})")).name == "movielens-100k"

    def test_make_targets_that_a_page_names_exist(self):
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        for page in PAGES:
            named = re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text("utf-8"), re.M)
            assert set(named) <= targets, page.name


class TestFiles:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_links_lead_somewhere(self, page):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == []

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_links_into_a_page_name_its_headings(self, page):
        links = re.findall(r"\]\(([^)#:]*\.md)?#([^)]+)\)", page.read_text("utf-8"))
        pages = [(page.parent / name if name else page, heading) for name, heading in links]
        assert [where for where in pages if where[1] not in headings(where[0])] == []

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_every_table_has_its_head(self, page):
        lines = ["", *page.read_text("utf-8").splitlines(), ""]
        tops = [
            i for i, line in enumerate(lines) if line.startswith("|") > lines[i - 1].startswith("|")
        ]
        assert [lines[i] for i in tops if not re.match(r"[|] ?:?-", lines[i + 1])] == []

    def test_the_table_of_what_to_open_names_files_that_exist(self):
        table = README.split("## To change X, open Y")[1].split("\n## ")[0]
        named = set(re.findall(r"`(tfrec/[\w/.]+)`", table))
        assert len(named) > 10
        assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

    def test_exit_codes_are_those_of_the_command_line(self):
        page = (ROOT / "docs" / "exit-codes.md").read_text("utf-8")
        documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
        real = {cli.DONE, cli.BUG, cli.BAD_INPUT, cli.ENVIRONMENT}
        assert documented == real | {cli.INTERRUPTED, cli.NOBODY_READS}


class TestPackages:
    def test_each_is_pinned_inside_its_range(self):
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if "==" in line)
        plain = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
        for wanted in requirements():
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            assert wanted.specifier.contains(plain[name]), wanted

    def test_every_line_of_the_constraints_is_exact(self):
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        loose = [s for s in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.!+-]+( ?;.*)?", s)]
        assert loose == []

    def test_each_is_explained(self):
        text = (ROOT / "docs" / "decisions.md").read_text("utf-8")
        stubs_and_runners = {"scipy-stubs", "types-tqdm", "pytest-xdist"}
        missing = {r.name for r in requirements() if r.name not in text}
        assert missing <= stubs_and_runners
