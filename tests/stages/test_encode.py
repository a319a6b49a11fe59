"""encode: Parquet files of vectors out of a finished run."""

import gzip
import json
import shutil

import checkerboard as board
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfrec import __version__, cli
from tfrec.artifact import Artifact
from tfrec.data.interactions import TRAIN, VALID
from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.models.engine import load_recommender
from tfrec.stages import encode

pytestmark = pytest.mark.slow

TEXTS = ["the war", "love story", "", "the war of space ship", "  ", "a film of 1999"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return board.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def recommender(run):
    return load_recommender(run)


@pytest.fixture(autouse=True)
def _loaded_once(run, recommender, monkeypatch):
    """Loading costs seconds; the loaded recommender keeps no state."""
    load = encode.load_recommender
    final = {(run, "final"), (run.resolve(), "final")}
    monkeypatch.setattr(
        encode, "load_recommender", lambda d, c: recommender if (d, c) in final else load(d, c)
    )


@pytest.fixture
def file(tmp_path):
    """A CSV file of texts with ids, the third and the fifth empty."""
    path = tmp_path / "reviews.csv"
    lines = [f"r{row},{text},x" for row, text in enumerate(TEXTS)]
    path.write_text("\n".join(["id,body,more", *lines]) + "\n")
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", 2)


def read(path):
    """Ids (None if there is no such column), vectors and our metadata of a file."""
    table = pq.read_table(path)
    told = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    name = table.column_names[0]
    ids = None if name == "vector" else table[name].to_pylist()
    width = table.schema.field("vector").type.list_size
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    return ids, vectors, {k.removeprefix("tfrec."): v for k, v in told.items() if "tfrec." in k}


# ---- what is written


def test_items_have_their_candidate_vectors(run, recommender, tmp_path):
    path = encode.run(run, "items", out=tmp_path / "items.parquet")
    ids, vectors, told = read(path)
    assert pq.read_schema(path).names == ["item_id", "vector"]
    assert ids == list(recommender.catalog.ids[1:])
    np.testing.assert_array_equal(vectors, recommender.vectors[1:])
    assert told["model"] == Artifact.peek(run / "adapt" / "retrieval").digest
    assert (told["what"], told["space"], told["cut"]) == ("items", "towers", "final")
    assert told["version"] == __version__


def test_users_have_query_vectors_whose_products_with_items_are_the_scores(
    run, recommender, tmp_path, small_blocks
):
    ids, users, told = read(encode.run(run, "users", out=tmp_path / "users.parquet"))
    names, items, _ = read(encode.run(run, "items", out=tmp_path / "items.parquet"))
    assert ids == list(recommender.users.ids)
    assert told["normalized"] == "false"
    row = ids.index("u3")
    lists = recommender.lists(recommender.interactions, np.array([row], np.int32), 5)["retrieval"]
    scores = dict(zip(names, items @ users[row], strict=True))
    found = [recommender.catalog.ids[i] for i in lists.ids[0]]
    np.testing.assert_allclose([scores[i] for i in found], lists.scores[0], rtol=1e-4)


def test_the_text_space_is_that_of_the_bert(run, recommender, tmp_path):
    out = tmp_path / "items.parquet"
    _, vectors, told = read(encode.run(run, "items", space="text", out=out))
    np.testing.assert_array_equal(vectors, recommender.text[1:])
    assert (told["space"], told["normalized"]) == ("text", "true")


def test_texts_of_a_file_have_the_vectors_of_the_bert_and_zeros_where_empty(
    run, recommender, file, tmp_path, small_blocks, capsys
):
    out = tmp_path / "reviews.parquet"
    ids, vectors, told = read(encode.run(run, "texts", texts=file, column="body", out=out))
    encoder = recommender.engine.text_encoder
    assert ids == [f"r{row}" for row in range(6)]
    empty = [2, 4]
    want = encoder.encode(TEXTS, role="passage")
    want[empty] = 0
    np.testing.assert_allclose(vectors, want, atol=1e-6)
    assert told["model"] == encoder.digest()
    assert (told["normalized"], told["column"], told["role"]) == ("true", "body", "passage")
    assert "2 of 6 rows have no text; their vectors are zeros" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl", "parquet", "tsv"])
def test_a_file_of_texts_may_be_of_any_format_and_have_no_ids(run, recommender, tmp_path, ending):
    texts, path = ["the war", "love story, 1999"], tmp_path / f"lines.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        lines = [*(["text"] if ending == "tsv" else []), *texts]
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    made = encode.run(run, "texts", texts=path, out=tmp_path / "out.parquet")
    ids, vectors, _ = read(made)
    assert ids is None
    want = recommender.engine.text_encoder.encode(texts, role="passage")
    np.testing.assert_allclose(vectors, want, atol=1e-6)


def test_without_a_name_it_lands_in_the_folder_of_the_run_given_by_its_retrieval_model(
    run, tmp_path
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    made = encode.run(copy / "adapt" / "retrieval", "items", space="text")
    assert made.resolve() == (copy / "encode" / "items-text.parquet").resolve()
    assert [p.name for p in (copy / "encode").iterdir()] == ["items-text.parquet"]


def test_another_cut_has_other_weights(run, recommender, tmp_path):
    out = tmp_path / "items.parquet"
    _, vectors, told = read(encode.run(run, "items", cut="select", out=out))
    assert told["cut"] == "select"
    np.testing.assert_array_equal(vectors, load_recommender(run, "select").vectors[1:])
    assert len(recommender.interactions) > len(recommender.interactions.part(TRAIN, VALID))


def test_the_command_hands_everything_on_and_prints_the_path(
    run, recommender, tmp_path, file, capsys
):
    out = tmp_path / "out.parquet"
    command = ["encode", str(run), "--what", "texts", "--texts", str(file), "--column", "body"]
    more = ["--id", "more", "--role", "query", "--cut", "final", "--space", "text"]
    assert cli.main([*command, *more, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    ids, _, told = read(out)
    assert ids == ["x"] * 6
    assert (told["id"], told["role"]) == ("more", "query")
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "its role and id are not the same" in capsys.readouterr().err
    assert cli.main([*command, "--out", str(out), "--force"]) == 0


# ---- again, interrupted, replaced


def test_the_same_command_again_does_nothing(run, tmp_path, capsys):
    path = encode.run(run, "items", out=tmp_path / "items.parquet")
    before = path.stat().st_mtime_ns
    encode.run(run, "items", out=path)
    assert path.stat().st_mtime_ns == before
    assert "holds these vectors already" in capsys.readouterr().err


def test_a_file_that_holds_something_else_stays_unless_forced(run, tmp_path):
    path = encode.run(run, "items", out=tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet exists .* its space is not the same"):
        encode.run(run, "items", space="text", out=path)
    encode.run(run, "items", space="text", out=path, force=True)
    assert read(path)[2]["space"] == "text"
    path.write_text("mine")
    with pytest.raises(InputError, match="not written by tfrec encode"):
        encode.run(run, "items", out=path)
    assert path.read_text() == "mine"


def interrupted(monkeypatch, recommender, after):
    """A context in which the BERT is stopped after so many calls; what it was given."""
    given = []
    plain = recommender.engine.text_encoder.encode

    def encode_some(texts, **more):
        if len(given) == after:
            raise KeyboardInterrupt
        given.append(list(texts))
        return plain(texts, **more)

    monkeypatch.setattr(recommender.engine.text_encoder, "encode", encode_some)
    return given


def test_an_interrupted_file_goes_on_where_it_was(
    run, recommender, file, tmp_path, small_blocks, monkeypatch, capsys
):
    arguments = {"texts": file, "column": "body"}
    want = read(encode.run(run, "texts", **arguments, out=tmp_path / "whole.parquet"))
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        interrupted(patch, recommender, 2)
        with pytest.raises(KeyboardInterrupt):
            encode.run(run, "texts", **arguments, out=out)
    assert not out.exists()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        given = interrupted(patch, recommender, 99)
        encode.run(run, "texts", **arguments, out=out)
    assert given == [["a film of 1999"]]
    assert "going on after 4 of 6 rows" in capsys.readouterr().err
    ids, vectors, told = read(out)
    assert (ids, told) == (want[0], want[2])
    np.testing.assert_array_equal(vectors, want[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.parquet",
        "reviews.csv",
        "whole.parquet",
    ]


def test_an_interrupted_file_begins_anew_if_the_texts_have_changed(
    run, recommender, file, tmp_path, small_blocks, monkeypatch
):
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        interrupted(patch, recommender, 2)
        with pytest.raises(KeyboardInterrupt):
            encode.run(run, "texts", texts=file, column="body", out=out)
    file.write_text("id,body\na,the war\nb,love\nc,film\n")
    ids, vectors, _ = read(encode.run(run, "texts", texts=file, column="body", out=out))
    assert ids == ["a", "b", "c"]
    want = recommender.engine.text_encoder.encode(["the war", "love", "film"], role="passage")
    np.testing.assert_allclose(vectors, want, atol=1e-6)


def test_no_more_than_a_block_is_in_memory(run, recommender, file, tmp_path, monkeypatch):
    file.write_text("text\n" + "".join(f"the war of {row}\n" for row in range(50)))
    monkeypatch.setattr(encode, "BLOCK", 8)
    given = interrupted(monkeypatch, recommender, 99)
    path = encode.run(run, "texts", texts=file, out=tmp_path / "out.parquet")
    assert [len(texts) for texts in given] == [8] * 6 + [2]
    assert pq.ParquetFile(path).num_row_groups == 7
    monkeypatch.setattr(encode, "_CHARACTERS", 30)
    given.clear()
    encode.run(run, "texts", texts=file, out=tmp_path / "other.parquet")
    assert {len(texts) for texts in given} == {2, 3}


# ---- what cannot be done


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, {}, r"there is no file .*\(--texts\)"),
        ("", {}, "is empty"),
        ("id,body\n", {"column": "body"}, "is empty: it has no rows"),
        ("id,body\na,\nb, \n", {"column": "body"}, "is empty: it has no text in column 'body'"),
        ("id,body\na,b\n", {}, "no column 'text'; it has id, body; name yours with --column NAME"),
        ("id,text\na,b\n", {"id_column": "key"}, "no column 'key'.*--id NAME"),
        ("id,text\na,b,c\n", {}, "line 2: 3 cells"),
        ("text\nwar\n", {"out": "out.csv"}, r"out\.csv is not the name of a \.parquet file"),
        ("text\nwar\n", {"space": "towers"}, "space of the towers"),
    ],
)
def test_texts_that_cannot_be_used_are_an_error_and_nothing_is_written(
    run, tmp_path, content, more, said
):
    path = tmp_path / "texts.csv"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "made" / more.pop("out", "out.parquet")
    with pytest.raises(InputError, match=said):
        encode.run(run, "texts", texts=path, out=out, **more)
    assert not list(tmp_path.rglob("*.parquet"))


def test_texts_and_their_file_belong_together(run):
    for what, texts in (("texts", None), ("items", "x.csv")):
        with pytest.raises(InputError, match="belong together"):
            encode.run(run, what, texts=texts)


def test_users_without_profile_texts_have_no_vectors_of_them(run, tmp_path):
    with pytest.raises(InputError, match="users of this run have no vectors of texts"):
        encode.run(run, "users", space="text", out=tmp_path / "out.parquet")


def test_a_folder_that_is_no_run_is_an_error(run, tmp_path):
    with pytest.raises(ArtifactError, match="prepare"):
        encode.run(tmp_path, "items")
    with pytest.raises(ArtifactError, match="is a dataset artifact; give the run's folder"):
        encode.run(run / "prepare", "items")
    assert not list(tmp_path.iterdir())


def test_texts_of_unknown_words_are_said(run, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("我需要一套西装\n红色的连衣裙 war\n")
    encode.run(run, "texts", texts=tmp_path / "t.txt", out=tmp_path / "out.parquet")
    said = capsys.readouterr().err
    assert "outside the vocabulary of this BERT" in said
    assert "multilingual-e5-small" in said


def test_a_full_disk_is_said_and_nothing_has_the_final_name(
    run, file, tmp_path, small_blocks, monkeypatch, recommender, full_device
):
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        interrupted(patch, recommender, 2)
        with pytest.raises(KeyboardInterrupt):
            encode.run(run, "texts", texts=file, column="body", out=out)
    (tmp_path / ".out.parquet.partial" / "unfinished").symlink_to(full_device)
    with pytest.raises(SetupError, match=r"no space left .*out\.parquet"):
        encode.run(run, "texts", texts=file, column="body", out=out)
    assert not out.exists()
    (tmp_path / ".out.parquet.partial" / "unfinished").unlink()
    assert read(encode.run(run, "texts", texts=file, column="body", out=out))[0][-1] == "r5"


def test_a_second_one_that_makes_the_same_file_is_refused(
    run, file, tmp_path, small_blocks, monkeypatch, recommender
):
    arguments = {"texts": file, "column": "body", "out": tmp_path / "out.parquet"}
    plain, refused = recommender.engine.text_encoder.encode, []

    def meanwhile(texts, **more):
        with pytest.raises(SetupError, match=r"another tfrec process is making .*out\.parquet"):
            encode.run(run, "texts", **arguments)
        refused.append(len(texts))
        return plain(texts, **more)

    monkeypatch.setattr(recommender.engine.text_encoder, "encode", meanwhile)
    assert read(encode.run(run, "texts", **arguments))[0][-1] == "r5"
    assert len(refused) == 3
    assert not (tmp_path / ".out.parquet.partial").exists()
