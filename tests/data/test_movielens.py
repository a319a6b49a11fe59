"""MovieLens: each raw form gives the same films, users and events."""

import gzip
import shutil

import numpy as np
import pytest

from tfrec.config import Config
from tfrec.data import movielens, sources
from tfrec.data.building import build
from tfrec.errors import InputError, SetupError

FLAGS = {"Animation": 3, "Children's": 4, "Comedy": 5}


def film(number, title, genres):
    flags = ["0"] * 19
    for genre in genres:
        flags[FLAGS.get(genre, 0)] = "1"
    return "|".join([number, title, "01-Jan-1995", "", "http://x", *flags])


def test_the_publishers_films_and_recboles_are_the_same(tmp_path):
    rows = [
        film("1", "Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
        film("267", "unknown", ["unknown"]),
        film("9", "Misérables, Les (1995) ", ["Comedy"]),
    ]
    original = movielens._films("".join(f"{row}\n" for row in rows).encode("latin-1"))
    path = tmp_path / "ml-100k.item"
    path.write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        "267\tunkonwn\tunkonwn\tunknown\n"
        "9\tMisérables, Les\t1995\tComedy\n",
        encoding="utf-8",
    )
    copy = movielens._recbole_films(path)
    assert original.ids == copy.ids == ("1", "267", "9")
    assert dict(original.columns) == dict(copy.columns)
    assert original.columns["title"] == ("Toy Story (1995)", "unknown", "Misérables, Les (1995)")
    assert original.columns["genres"][0] == "Animation|Children's|Comedy"


def made(name, folder):
    config = Config.load(name, [f"data.data_dir={folder}"])
    return build(sources.read(config.data), config.data)


@pytest.fixture(scope="module")
def original(shared_data):
    return made("movielens-100k", shared_data / "ml-100k")


def test_movielens_100k_has_the_counts_that_its_publisher_states(original):
    assert (len(original.interactions), original.catalog.num_items, len(original.users)) == (
        100_000,
        1_682,
        943,
    )
    histogram = np.bincount(original.interactions.rating.astype(int))[1:]
    assert histogram.tolist() == [6110, 11370, 27145, 34174, 21201]
    assert len(original.catalog.schema.vocabularies["genres"]) == 19


def test_movielens_100k_has_titles_texts_and_profiles(original):
    catalog, users = original.catalog, original.users
    row = catalog.row("1")
    assert catalog.titles[row] == "Toy Story (1995)"
    assert catalog.texts[row] == "Toy Story (1995). Animation, Children's, Comedy"
    assert users.texts[users.row("1")] == "age 24, gender M, occupation technician"
    assert set(users.attributes) == {"age", "gender", "occupation"}


def test_the_copy_in_recboles_wheel_gives_the_very_same_data_set(original, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ARCHIVES", "http://127.0.0.1:9/")
    try:
        folder = sources.fetch("movielens-100k", cache_dir=tmp_path)
    except SetupError as error:
        pytest.skip(f"no package index: {error}")
    assert not (folder / "u.item").exists()
    copy = made("movielens-100k", folder)
    for name in ("user", "item", "timestamp", "event", "rating", "weight", "split"):
        np.testing.assert_array_equal(
            getattr(original.interactions, name), getattr(copy.interactions, name)
        )
    for a, b in ((original.catalog, copy.catalog), (original.users, copy.users)):
        assert (a.ids, a.titles, a.texts) == (b.ids, b.titles, b.texts)
        assert (dict(a.attributes), a.schema) == (dict(b.attributes), b.schema)
    assert original.summary == copy.summary


def test_movielens_1m_has_the_counts_that_its_publisher_states(shared_data):
    built = made("movielens-1m", shared_data / "ml-1m")
    assert len(built.interactions) == 1_000_209
    assert len(np.unique(built.interactions.item)) == 3_706
    assert (built.catalog.num_items, len(built.users)) == (3_883, 6_040)
    histogram = np.bincount(built.interactions.rating.astype(int))[1:]
    assert histogram.tolist() == [56174, 107557, 261197, 348971, 226310]
    assert built.users.texts[0] == "age under 18, gender F, occupation K-12 student"
    assert len(built.catalog.schema.vocabularies["genres"]) == 18


def test_a_folder_may_hold_movielens_1m_packed_or_not(shared_data, tmp_path):
    for member in ("movies.dat", "users.dat"):
        shutil.copy(shared_data / "ml-1m" / member, tmp_path)
    packed = (shared_data / "ml-1m" / "ratings.dat.gz").read_bytes()
    (tmp_path / "ratings.dat").write_bytes(gzip.decompress(packed))
    assert sources.fetch("movielens-1m", tmp_path) == tmp_path
    (tmp_path / "ratings.dat").unlink()
    (tmp_path / "ratings.dat.gz").write_bytes(packed[:-100])
    with pytest.raises(InputError, match="cut off"):
        sources.fetch("movielens-1m", tmp_path)


def latest_small(folder):
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,10,4.0,964982703\n1,20,2.5,964982931\n2,10,5.0,1\n"
    )
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n10,"Heat, The (1995)",Action|Crime\n20,Oddity,(no genres listed)\n'
    )
    return folder


def test_movielens_latest_small_is_read_from_its_csv_files(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "_LATEST_SMALL_ROWS", {"ratings": 3, "users": 2, "movies": 2})
    config = Config.load(
        "movielens-latest-small", [f"data.data_dir={latest_small(tmp_path)}", "data.split=none"]
    )
    built = build(sources.read(config.data), config.data)
    assert built.catalog.titles == ("", "Heat, The (1995)", "Oddity")
    assert built.catalog.texts == ("", "Heat, The (1995). Action, Crime", "Oddity")
    assert built.interactions.rating.tolist() == [4, 2.5, 5]


def test_another_release_of_movielens_latest_small_is_refused(tmp_path):
    config = Config.load("movielens-latest-small", [f"data.data_dir={latest_small(tmp_path)}"])
    with pytest.raises(InputError, match="100836"):
        sources.read(config.data)
