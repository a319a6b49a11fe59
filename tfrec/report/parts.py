"""Parts: the pieces of HTML that pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tfrec.report.style import CSS


def document(title: str, body: Iterable[str]) -> str:
    """A whole page, which loads nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def findings(lines: Iterable[str]) -> str:
    """What follows from the figures, in sentences."""
    return "<ul class=findings>" + "".join(f"<li>{escape(one)}" for one in lines) + "</ul>"


def section(title: str, content: str) -> str:
    """A titled part of the page; nothing where there is nothing to show."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def tile(name: str, value: str, about: str) -> str:
    """A number that is seen first."""
    return (
        f"<div class=tile><span>{escape(name)}</span><b>{escape(value)}</b>"
        f"<span>{escape(about)}</span></div>"
    )


def figure(drawn: Mapping[str, str], name: str, caption: str = "") -> str:
    """One of the drawn figures, if it was drawn."""
    if name not in drawn:
        return ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{drawn[name]}{below}</figure>"


def note(text: str) -> str:
    """A remark in small type."""
    return f"<p class=note>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]], kind: str = "") -> str:
    """A table of rows, each its cells as HTML and its CSS class."""
    top = "".join(f"<th>{escape(cell)}" for cell in head)
    body = "".join(
        f'<tr class="{css}">' + "".join(f"<td>{cell}" for cell in cells) for cells, css in rows
    )
    return f'<div class=wide><table class="{kind}"><thead><tr>{top}<tbody>{body}</table></div>'


def pairs_table(told: Iterable[tuple[str, Any]]) -> str:
    """A table of two columns; what has no value is left out."""
    rows = [([escape(name), escape(plain(value))], "") for name, value in told if value is not None]
    return table(["", ""], rows, "pairs")


def pairs(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in settings.items())


def plain(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
