"""Files: what is read from each format, and what is said of a damaged one."""

import gzip
import json
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfrec.data import tables
from tfrec.data.tables import Columns, open_table
from tfrec.errors import InputError

ROWS = [
    {"user_id": "007", "item_id": 'a "quoted", cell', "n": "1"},
    {"user_id": "2020-01-01", "item_id": "two\nlines", "n": "2"},
    {"user_id": "é漢🙂", "item_id": "", "n": "3"},
]


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


def written(path, rows=ROWS):
    """Writes rows in the format that the name says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    elif kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        between = {"csv": ",", "tsv": "\t"}[kind]
        lines = [rows[0], *[row.values() for row in rows]]
        content = "".join(between.join(map(quoted, line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def everything(reader, columns=None):
    names = columns or reader.columns
    return [row for batch in reader.batches(list(names)) for row in batch.to_pylist()]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path, ending, packed):
    reader = open_table(written(tmp_path / f"t.{ending}{packed}"), "data.items")
    assert reader.columns == ("user_id", "item_id", "n")
    assert everything(reader) == ROWS
    assert everything(reader, ["n"]) == [{"n": "1"}, {"n": "2"}, {"n": "3"}]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_text_file_has_a_row_for_each_line(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(tables, "_LINES", 2)
    path = tmp_path / f"t.txt{packed}"
    content = '\ufeffé, "quoted"\r\n\n  two words \nlast'.encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    reader = open_table(path, "--texts")
    assert reader.columns == ("text",)
    lines = ['é, "quoted"', "", "  two words ", "last"]
    assert everything(reader) == [{"text": line} for line in lines]
    assert reader.where(2) == "line 3"


def test_a_text_file_that_is_not_utf_8_says_in_which_line(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\nf\xfcnf\n")
    with pytest.raises(InputError, match=r"t\.txt, line 2: is not UTF-8"):
        everything(open_table(tmp_path / "t.txt", "--texts"))


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\n1,2\n\n3,4\n")
    assert everything(open_table(path, "data.items")) == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]


def test_lines_may_end_as_windows_ends_them(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'a,b\r\n"1,1",2\r\n\r\n3,4\r\n')
    reader = open_table(path, "data.items")
    assert everything(reader) == [{"a": "1,1", "b": "2"}, {"a": "3", "b": "4"}]
    assert reader.where(1) == "line 4"


def test_rows_are_named_by_their_line_even_below_cells_of_several_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n"two\nlines",2\n\n3,4\n')
    reader = open_table(path, "data.items")
    assert [reader.where(0), reader.where(1)] == ["line 2", "line 5"]


def test_json_columns_may_appear_late_and_change_their_type(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"a": "x", "b": [1, 2]}\n\n{"a": 2.5}\n')
    reader = open_table(path, "data.items")
    assert reader.columns == ("a", "b")
    assert [row["a"] for row in everything(reader)] == ["1", "x", "2.5"]
    assert reader.where(2) == "line 4"


def test_columns_in_memory_may_mix_types_and_lack_values():
    reader = Columns("the events", {"a": [1, "x", None], "b": [1.0, float("nan"), 2]})
    assert [row["a"] for row in everything(reader)] == ["1", "x", None]
    assert [row["b"] for row in everything(reader)] == [1.0, None, 2.0]


def test_columns_in_memory_have_one_length():
    with pytest.raises(InputError, match="differ in length"):
        Columns("the events", {"a": [1], "b": [1, 2]})


def refusal(path, content=None):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        everything(open_table(path, "data.items"))
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_a_missing_file_is_named_with_its_setting(tmp_path):
    assert "data.items" in refusal(tmp_path / "none.csv")


def test_a_folder_without_tables_says_what_it_looked_for(tmp_path):
    (tmp_path / "t.csv").mkdir()
    (tmp_path / "t.csv" / ".hidden.csv").write_text("a\n1\n")
    (tmp_path / "t.csv" / "README").write_text("words\n")
    assert ".csv, .tsv, .parquet" in refusal(tmp_path / "t.csv")


def test_a_folder_is_read_as_one_table_in_the_order_of_names(tmp_path):
    written(tmp_path / "2.parquet", ROWS[1:2])
    written(tmp_path / "1.csv", ROWS[:1])
    written(tmp_path / "3.jsonl.gz", ROWS[2:])
    written(tmp_path / ".4.parquet", ROWS)
    reader = open_table(tmp_path, "data.interactions")
    assert reader.columns == ("user_id", "item_id", "n")
    assert everything(reader) == ROWS
    assert [reader.where(0), reader.where(2)] == ["1.csv, line 2", "3.jsonl.gz, line 1"]


def test_files_of_a_folder_may_order_their_columns_as_they_like(tmp_path):
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("b,a\n4,3\n")
    rows = everything(open_table(tmp_path, "data.interactions"))
    assert rows == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_files_of_a_folder_need_the_same_columns(tmp_path):
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("a,c\n1,2\n")
    message = refusal(tmp_path)
    assert "1.csv has the columns a, b, and" in message
    assert "2.csv a, c;" in message


def test_an_unknown_ending_names_the_known_ones(tmp_path):
    assert ".csv, .tsv, .parquet, .jsonl" in refusal(tmp_path / "t.xlsx", b"PK")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_an_empty_file_is_called_empty(tmp_path, ending):
    assert "is empty" in refusal(tmp_path / f"t.{ending}", b"")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_file_of_blank_lines_is_called_empty(tmp_path, name):
    assert "is empty" in refusal(tmp_path / name, b"\n\n")


def test_a_parquet_file_without_rows_is_called_empty(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "t.parquet")
    assert "is empty" in refusal(tmp_path / "t.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path):
    assert "two columns named 'a'" in refusal(tmp_path / "t.csv", b"a,b,a\n1,2,3\n")


def test_a_row_with_too_few_cells_is_named_by_its_line(tmp_path):
    message = refusal(tmp_path / "t.csv", b"a,b\n" + b"1,2\n" * 5 + b"3\n")
    assert "line 7: 1 cells" in message


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\né,3\n".encode("latin-1"), "a,b\n1,2\n".encode("utf-16")]
)
def test_another_encoding_is_named_by_its_line(tmp_path, content):
    message = refusal(tmp_path / "t.csv", content)
    assert "not UTF-8" in message
    assert "line " in message


def test_json_that_is_none_is_named_by_its_line(tmp_path):
    assert "line 2: no JSON" in refusal(tmp_path / "t.jsonl", b'{"a": 1}\n{"a": \n')
    assert "line 1: holds '[1]'" in refusal(tmp_path / "t.jsonl", b"[1]\n")


def test_json_that_breaks_far_below_is_named_by_its_line(tmp_path):
    content = b'{"a": "x"}\n' * 3000 + b"{]\n"
    assert "line 3001: no JSON" in refusal(tmp_path / "t.jsonl", content)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz", "t.parquet.gz"])
@pytest.mark.parametrize("missing", [1, 8, 30])
def test_a_truncated_gzip_is_called_cut_off(tmp_path, name, missing):
    rows = [{"user_id": f"u{i}", "item_id": f"i{i * 7919 % 1000}"} for i in range(3000)]
    content = written(tmp_path / name, rows).read_bytes()
    assert "cut off" in refusal(tmp_path / name, content[:-missing])


def test_a_gzip_cut_between_two_rows_is_noticed_too(tmp_path):
    packer = zlib.compressobj(wbits=31)
    rows = b"".join(b"u%d,i%d\n" % (i, i) for i in range(100_000))
    content = packer.compress(b"user_id,item_id\n" + rows) + packer.flush(zlib.Z_SYNC_FLUSH)
    assert "cut off" in refusal(tmp_path / "t.csv.gz", content)


def test_what_ends_in_gz_and_is_none_is_refused(tmp_path):
    assert "no whole gzip" in refusal(tmp_path / "t.csv.gz", b"a,b\n1,2\n")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    content = written(tmp_path / "t.parquet").read_bytes()
    assert "no whole Parquet" in refusal(tmp_path / "t.parquet", content[:-10])
