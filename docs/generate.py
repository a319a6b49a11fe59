"""Writes the pages of docs/ that are made from the code: `make docs`; `--check` only compares."""

import argparse
import ast
import configparser
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tfrec import cli
from tfrec.config import Config, Section, TrainingConfig, presets

DOCS = Path(__file__).parent
MADE = "<!-- Made by docs/generate.py: change the code, then `make docs`. -->"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def pages() -> dict[Path, str]:
    """File -> its whole text."""
    made = {"configuration.md": configuration(), "commands.md": commands()}
    whole = {DOCS / name: f"{MADE}\n\n{chr(10).join(lines)}\n" for name, lines in made.items()}
    architecture = DOCS / "architecture.md"
    between = re.compile(r"(<!-- rooms:.*? -->\n).*?(<!-- /rooms -->)", re.S)
    listing = "\n".join(["", *rooms(), "", ""])
    text = architecture.read_text("utf-8")
    return whole | {architecture: between.sub(rf"\g<1>{listing}\g<2>", text)}


def rooms() -> Iterator[str]:
    """A table of every module, in the order of the layers."""
    yield "| row | room | |"
    yield "|---|---|---|"
    contracts = configparser.ConfigParser()
    contracts.read(DOCS.parent / "setup.cfg")
    layers = contracts["importlinter:contract:layers"]["layers"].split("\n")
    number = 0
    for layer in filter(None, layers):
        found = [_modules(name.strip(" ()")) for name in re.split(r"[|:]", layer)]
        number += any(found)
        for module, about in (entry for entries in found for entry in entries):
            yield _row(str(number), f"`{module}`", about)


def _modules(name: str) -> list[tuple[str, str]]:
    """Path in tfrec/ -> the first line of its docstring, for a module or every one of a package."""
    root = DOCS.parent / "tfrec"
    place = root / name.removeprefix("tfrec.").replace(".", "/")
    paths = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return [
        (str(path.relative_to(root)), _about(path))
        for path in paths
        if path.exists() and path.name != "__init__.py"
    ]


def _about(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


def configuration() -> Iterator[str]:
    yield "# Configuration"
    yield ""
    yield "A run is described by one preset, one TOML file, or the word `files`; each key can be"
    yield "changed for once with `--set section.key=value`. An unknown key or a value out of range"
    yield f"is an error (exit code 2). Presets: {', '.join(f'`{name}`' for name in presets())}."
    yield ""
    yield "```toml"
    yield 'name = "shop"                   # the run lands in saved_models/shop'
    yield ""
    yield "[data]"
    yield 'interactions = "events.csv"'
    yield 'items = "items.csv"'
    yield 'columns = {user_id = "customer", timestamp = "time"}'
    yield ""
    yield "[adapt]"
    yield "epochs = 30                     # of every task"
    yield ""
    yield "[adapt.retrieval]"
    yield "embedding_dim = 128"
    yield "```"
    yield from _section("", Config)
    yield ""
    yield "The keys that one fit needs may also stand in `[adapt]`; then they hold for every task"
    shared = ", ".join(f"`{key}`" for key in TrainingConfig.model_fields)
    yield f"that does not set its own: {shared}."


def _section(path: str, section: type[Section]) -> Iterator[str]:
    fields = section.model_fields
    inner = {key: f.annotation for key, f in fields.items() if _is_section(f.annotation)}
    plain = {key: field for key, field in fields.items() if key not in inner}
    yield ""
    yield f"## `[{path}]`" if path else "## Top level"
    yield ""
    yield (section.__doc__ or "").split("\n")[0]
    yield ""
    yield "| key | value | default | what it does |"
    yield "|---|---|---|---|"
    for key, field in plain.items():
        full = f"{path}.{key}" if path else key
        yield _row(f"`{full}`", _values(field), _default(field), _described(section, key))
    for key, model in inner.items():
        yield from _section(f"{path}.{key}" if path else key, model)


def _described(section: type[Section], key: str) -> str:
    """The field's description, or that of the field it takes the place of."""
    parents = [p for p in section.__mro__ if issubclass(p, Section) and key in p.model_fields]
    return next((found for p in parents if (found := p.model_fields[key].description)), "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", r"\|").replace("<", "&lt;") for c in cells) + " |"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, name):,}"
        for limit in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[1]
        return "table" if inner is Any else f"table of {_type(inner)}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(one) for one in get_args(annotation))
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(annotation, "nothing")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "not set" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def commands() -> Iterator[str]:
    yield "# Commands"
    yield ""
    yield "`tfrec VERB --help` says the same. Exit codes: [exit-codes.md](exit-codes.md)."
    for name, parser in _verbs(cli.parser()):
        yield ""
        yield f"## {name}"
        yield ""
        if parser.description:
            yield parser.description
            yield ""
        yield "```sh"
        yield from (line[2:] for line in (parser.epilog or "").splitlines() if line[:2] == "  ")
        yield "```"
        yield ""
        options = [a for a in parser._actions if a.help and a.dest != "help"]
        if options:
            yield "| | |"
            yield "|---|---|"
        yield from (_row(_name(option), option.help or "") for option in options)


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    children = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not children:
        yield parser.prog, parser
    for action in children:
        for child in action.choices.values():
            yield from _verbs(child)


def _name(action: argparse.Action) -> str:
    value = action.metavar or (action.choices and "{" + ",".join(action.choices) + "}") or ""
    names = ", ".join(f"{name} {value}".strip() for name in action.option_strings)
    return f"`{names or value}`"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    check = arguments.parse_args().check
    stale = {
        path: text
        for path, text in pages().items()
        if not path.exists() or path.read_text("utf-8") != text
    }
    for path, text in stale.items():
        print(f"{path.name} {'is stale: make docs' if check else 'written'}")
        if not check:
            path.write_text(text, "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
