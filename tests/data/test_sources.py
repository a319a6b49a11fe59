"""Sources: names, the cache, downloads that fail, and the user's own files."""

import gzip
import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from tfrec.config import DataConfig
from tfrec.data import sources
from tfrec.errors import ConfigError, InputError, SetupError

CONTENT = {"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3,4\n", "movies.csv": b"x\n"}


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A folder that stands for the publisher's site; it has one known archive."""
    site = tmp_path / "site"
    site.mkdir()
    archive(site, CONTENT)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    known = sources.Source("small", digests, sources.movielens.read_latest_small, "for tests")
    monkeypatch.setitem(sources._SOURCES, "small", known)
    monkeypatch.setattr(sources, "ARCHIVES", f"{site.as_uri()}/")
    return site


def archive(site, content):
    with zipfile.ZipFile(site / "small.zip", "w") as packed:
        for name, data in content.items():
            packed.writestr(f"small/{name}", data)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "ARCHIVES", "http://127.0.0.1:9/")

    def no_pip(source, folder):
        raise OSError("no package index")

    monkeypatch.setattr(sources, "_from_recbole", no_pip)
    no_pip.__name__ = "_from_recbole"


def test_the_names_are_listed():
    assert sources.names() == ("movielens-100k", "movielens-1m", "movielens-latest-small")
    listed = "\n".join(sources.listing())
    assert all(name in listed for name in (*sources.names(), "files"))


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="'movielens-10k'; did you mean 'movielens-100k'"):
        sources.fetch("movielens-10k")
    with pytest.raises(ConfigError, match="known: movielens-100k"):
        sources.read(DataConfig(source="netflix"))


def test_a_download_is_checked_cached_and_not_repeated(publisher, tmp_path):
    folder = sources.fetch("small", cache_dir=tmp_path / "cache")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == CONTENT
    assert [f.name for f in folder.parent.iterdir()] == ["small"]  # no scratch left
    shutil.rmtree(publisher)
    assert sources.fetch("small", cache_dir=tmp_path / "cache") == folder


def test_a_damaged_cache_is_downloaded_again(publisher, tmp_path):
    folder = sources.fetch("small", cache_dir=tmp_path / "cache")
    (folder / "movies.csv").write_bytes(b"changed")
    assert sources.fetch("small", cache_dir=tmp_path / "cache") == folder
    assert (folder / "movies.csv").read_bytes() == CONTENT["movies.csv"]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TFREC_CACHE", raising=False)
    assert sources.cache_folder() == tmp_path / "tfrec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_folder() == Path.home() / ".cache" / "tfrec"
    monkeypatch.setenv("TFREC_CACHE", str(tmp_path / "mine"))
    assert sources.cache_folder() == tmp_path / "mine"


def test_an_archive_whose_content_is_another_is_refused_and_not_cached(publisher, tmp_path):
    archive(publisher, CONTENT | {"movies.csv": b"y\n"})
    with pytest.raises(SetupError, match=r"movies\.csv has the SHA-256 .* publisher's has"):
        sources.fetch("small", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "data").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "no zip", "member missing"])
def test_a_damaged_archive_is_refused(publisher, tmp_path, damage):
    path = publisher / "small.zip"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "no zip":
        path.write_bytes(b"<html>sign in to the hotel's network</html>")
    else:
        archive(publisher, {"movies.csv": CONTENT["movies.csv"]})
    with pytest.raises(SetupError, match="cannot download small"):
        sources.fetch("small", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["movielens-100k", "movielens-1m", "movielens-latest-small"])
def test_without_network_and_cache_it_says_what_to_do_instead(offline, tmp_path, name):
    with pytest.raises(SetupError) as caught:
        sources.fetch(name, cache_dir=tmp_path)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "refused" in message
    assert "data.data_dir=DIR" in message
    assert "tfrec run files" in message
    assert ("no package index" in message) == (name == "movielens-100k")


def test_a_cache_that_cannot_be_written_is_named(publisher, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(SetupError, match="cannot keep small in"):
        sources.fetch("small", cache_dir=tmp_path / "cache")


def test_a_folder_of_ones_own_is_checked(publisher, tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    assert sources.fetch("small", tmp_path) == tmp_path
    (tmp_path / "ratings.csv").unlink()
    (tmp_path / "ratings.csv.gz").write_bytes(gzip.compress(CONTENT["ratings.csv"]))
    assert sources.fetch("small", str(tmp_path)) == tmp_path


def test_a_folder_that_lacks_a_file_or_holds_another_is_refused(publisher, tmp_path):
    with pytest.raises(InputError, match=r"no folder.*ratings\.csv, movies\.csv"):
        sources.fetch("small", tmp_path / "none")
    with pytest.raises(InputError, match=r"no file ratings\.csv"):
        sources.fetch("small", tmp_path)
    (tmp_path / "ratings.csv").write_bytes(b"other")
    with pytest.raises(InputError, match=r"ratings\.csv has the SHA-256 .*use the source `files`"):
        sources.fetch("small", tmp_path)


def test_own_files_need_interactions():
    with pytest.raises(ConfigError, match=r"set data\.interactions"):
        sources.read(DataConfig())


def test_own_files_are_read(tmp_path):
    (tmp_path / "e.csv").write_text("who,item_id,timestamp\nu,i,5\n")
    (tmp_path / "i.tsv").write_text("item_id\tname\ni\tI\n")
    (tmp_path / "u.jsonl").write_text('{"who": "u", "age": 7}\n')
    config = DataConfig(
        interactions=str(tmp_path / "e.csv"),
        items=str(tmp_path / "i.tsv"),
        users=str(tmp_path / "u.jsonl"),
        columns={"user_id": "who", "title": "name"},
    )
    raw = sources.read(config)
    assert raw.events.user_ids == raw.users.ids == ("u",)
    assert raw.items.columns["title"] == ("I",)
    assert raw.users.columns["age"] == ("7",)


def test_a_folder_of_events_is_read_and_a_new_file_in_it_noticed(tmp_path):
    (tmp_path / "1.csv").write_text("user_id,item_id,timestamp\nu,i,5\n")
    (tmp_path / "2.csv").write_text("user_id,item_id,timestamp\nv,i,x\n")
    config = DataConfig(interactions=str(tmp_path))
    with pytest.raises(InputError, match=r"2\.csv, line 2: column 'timestamp'"):
        sources.read(config)
    (tmp_path / "2.csv").write_text("user_id,item_id,timestamp\nv,i,6\n")
    before = sources.input_digests(config)
    assert sources.read(config).events.user_ids == ("u", "v")
    assert sources.input_digests(config) == before
    (tmp_path / "3.csv").write_text("user_id,item_id,timestamp\nw,i,7\n")
    assert sources.input_digests(config) != before


@pytest.mark.parametrize("setting", ["interactions", "items", "users"])
def test_a_missing_file_is_named_with_its_setting(tmp_path, setting):
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\nu,i,5\n")
    paths = {"interactions": str(tmp_path / "e.csv")} | {setting: str(tmp_path / "none.csv")}
    with pytest.raises(InputError, match=rf"no file .*none\.csv \(data\.{setting}\)"):
        sources.read(DataConfig(**paths))
