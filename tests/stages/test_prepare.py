"""prepare: one artifact, made once for the same settings and files, or not at all."""

import json
import os

import pytest

from tfrec.artifact import Artifact
from tfrec.config import Config
from tfrec.data.dataset import Dataset
from tfrec.errors import InputError, SetupError
from tfrec.stages import prepare


@pytest.fixture
def files(tmp_path):
    """Events of three users, among them one with an item that the items file lacks."""
    rows = [f"u{u},i{(u + t) % 4},{t}\n" for u in range(3) for t in range(4)]
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    (tmp_path / "items.csv").write_text(
        "item_id,title,colour\ni0,Zero,red\ni1,One,red\ni2,Two,blue\nnever,Never,blue\n"
    )
    return tmp_path


def config(folder, *settings):
    given = [f"data.interactions={folder / 'events.csv'}", f"data.items={folder / 'items.csv'}"]
    return Config.load("files", [*given, *settings])


def test_it_leaves_a_dataset(files):
    artifact = prepare.run(config(files), files / "run")
    assert artifact.path == files / "run" / "prepare"
    assert Artifact.load(artifact.path).kind == "dataset"
    made = Dataset.load(artifact)
    assert len(made.interactions) == 12
    assert made.catalog.ids == ("", "i0", "i1", "i2", "never", "i3")


def test_its_metrics_say_what_was_read_and_dropped(files):
    artifact = prepare.run(config(files, "data.unknown_items=drop"), files / "run")
    assert artifact.metrics["rows"] == 12
    assert artifact.metrics["dropped"] == {"unknown_item": 3}
    assert artifact.metrics["interactions"] == 9
    assert artifact.metrics["items_without_events"] == 1
    assert artifact.metrics["split"] == {"train": 3, "valid": 3, "test": 3}


def test_unknown_items_that_are_kept_are_counted(files):
    metrics = prepare.run(config(files), files / "run").metrics
    assert (metrics["unknown_items"], metrics["unknown_item_interactions"]) == (1, 3)


def test_its_summary_is_a_table_for_people(files):
    artifact = prepare.run(config(files, "data.unknown_items=drop"), files / "run")
    lines = prepare.summary_lines(artifact)
    assert lines[:3] == [
        "interactions read             12",
        "  dropped                      3   of items that are not in the items file",
        "interactions kept              9   1970-01-01 to 1970-01-01",
    ]
    assert "item attributes: colour (categorical, 2 values)" in lines


def test_it_is_made_once_for_the_same_settings_and_files(files):
    first = prepare.run(config(files), files / "run")
    inode = os.stat(first.path).st_ino
    assert prepare.run(config(files), files / "run").digest == first.digest
    assert os.stat(first.path).st_ino == inode
    prepare.run(config(files), files / "run", force=True)
    assert os.stat(first.path).st_ino != inode


def test_it_leaves_what_the_run_was_told_even_where_nothing_is_made(files):
    for k in ("3", "4"):
        asked = config(files, f"recommend.k={k}")
        prepare.run(asked, files / "run")
        assert Config.parse(json.loads((files / "run" / "config.json").read_text())) == asked


def test_other_settings_or_changed_files_make_it_anew(files):
    first = prepare.run(config(files), files / "run")
    other = prepare.run(config(files, "data.split=none"), files / "run")
    assert other.digest != first.digest
    with (files / "events.csv").open("a") as out:
        out.write("u9,i0,9\n")
    assert prepare.run(config(files, "data.split=none"), files / "run").metrics["rows"] == 13


def test_the_seed_matters_only_where_the_split_is_drawn(files):
    def digest(*settings):
        return prepare.run(config(files, *settings), files / "run").digest

    assert digest("seed=1") == digest("seed=2")
    assert digest("data.split=item_cold", "seed=1") != digest("data.split=item_cold", "seed=2")


def test_the_same_recipe_gives_the_same_bytes(files):
    first = prepare.run(config(files), files / "run")
    assert prepare.run(config(files), files / "again").files == first.files


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("events.csv", "", "is empty"),
        ("events.csv", "user_id,item_id,timestamp\n", "has no rows"),
        ("events.csv", "user,item_id,timestamp\na,i0,1\n", "no column 'user_id'; it has user,"),
        ("events.csv", "user_id,item_id,timestamp\na,i0,soon\n", "events.csv, line 2"),
        ("events.csv", "user_id,item_id,timestamp,rating\na,i0,1,inf\n", "'rating' is 'inf'"),
        ("events.csv", "user_id,item_id,timestamp\na,i0,1\n", "at least 1 user with 3 events"),
        ("items.csv", "item_id,title\ni0,A\ni0,B\n", "'i0' stands there twice"),
        ("items.csv", "item_id,price\ni0,1\ni1,nan\n", "'price' of 'i1' is 'nan'"),
        ("items.csv", "title\nA\n", "no column 'item_id'; it has title"),
    ],
)
def test_bad_input_is_one_line_and_leaves_what_was_there(files, file, content, problem):
    good = prepare.run(config(files), files / "run")
    (files / file).write_text(content)
    with pytest.raises(InputError) as caught:
        prepare.run(config(files), files / "run")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert Artifact.load(good.path).digest == good.digest
    assert sorted(os.listdir(files / "run")) == ["config.json", "prepare"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing_half_written(files, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tfrec.data.dataset._write_table", fail)
    expected = SetupError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        prepare.run(config(files), files / "run")
    assert os.listdir(files / "run") == []


def test_unknown_items_may_be_an_error(files):
    with pytest.raises(InputError, match="3 interactions are with items that the items file lacks"):
        prepare.run(config(files, "data.unknown_items=error"), files / "run")


def test_columns_to_map_are_ours():
    from tfrec.errors import ConfigError

    with pytest.raises(ConfigError, match="'userid' is none of our columns"):
        Config.load("files", ["data.columns.userid=x"])
    with pytest.raises(ConfigError, match="must not be negative"):
        Config.load("files", ["data.event_weights.view=-1"])
