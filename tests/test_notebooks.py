"""The notebooks run from top to bottom, on a small data set and a tiny BERT."""

import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from tiny_bert import write_tiny_bert

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """60 users and 200 films with MovieLens' ids, columns and words; two epochs of everything."""
    folder = tmp_path_factory.mktemp("films")
    drawn = np.random.default_rng(1)
    events = ["user_id,item_id,timestamp,rating"]
    for user in range(1, 61):
        films = drawn.choice(np.arange(1, 201), size=12, replace=False)
        events += [f"{user},{film},{t},{drawn.integers(1, 6)}" for t, film in enumerate(films)]
    (folder / "events.csv").write_text("\n".join(events) + "\n")
    films = ["item_id,title,genres"]
    films += [f"{film},film {film},{('War', 'Comedy')[film % 2]}" for film in range(1, 201)]
    (folder / "items.csv").write_text("\n".join(films) + "\n")
    return [
        "data.source=files",
        f"data.interactions={folder / 'events.csv'}",
        f"data.items={folder / 'items.csv'}",
        f"adapt.text={write_tiny_bert(folder / 'bert')}",
        "adapt.text_length=16",
        "adapt.epochs=2",
        "adapt.refit_epochs=1",
        "adapt.batch_size=8",
        "adapt.ranking.candidates=20",
        'evaluate.baselines=["popular"]',
        "evaluate.bootstrap=0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TFREC_NOTEBOOK_SETTINGS", " ".join(settings))
    monkeypatch.setenv("TFREC_NOTEBOOK_OUT", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
