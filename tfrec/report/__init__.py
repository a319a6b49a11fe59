"""Report: what was measured, as one HTML page, as JSON, and as text for the terminal.

The JSON is the whole report; the page and the text are drawn from it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfrec.artifact import write_json
from tfrec.report.page import page
from tfrec.report.text import text_examples, text_table

__all__ = ["text_examples", "text_table", "write"]


def write(tree: Mapping[str, Any], folder: Path) -> None:
    """Writes report.json and report.html, which is one file that loads nothing from elsewhere.

    Args:
      tree: Plain finite values, as :mod:`tfrec.stages.evaluate` gathers them.
      folder: Where to.
    """
    path = folder / "report.json"
    write_json(path, tree)
    (folder / "report.html").write_text(page(json.loads(path.read_text("utf-8"))), "utf-8")
