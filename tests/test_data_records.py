"""Records of every format: what they hold, and what is said of bad ones."""

import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from jaxlm.data.records import BadRecord, Column, Counts, read_records, usable
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError

PACK = {"gz": gzip.compress, "zst": zstandard.compress}


def columns(source=None, target=None):
    return (
        Column("source", "data.source_column", source, 1),
        Column("target", "data.target_column", target, 2),
    )


def read(path, source=None, target=None, counts=None, **settings):
    """The texts of both columns."""
    data = DataConfig(train=(str(path),), **settings)
    pair = columns(source, target)
    records = read_records(str(path), data, pair)
    return list(usable(records, lambda r: tuple(map(r.text, pair)), data, counts or Counts()))


def write(path, content, pack=bytes):
    path.write_bytes(pack(content if isinstance(content, bytes) else content.encode()))
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.tsv.zst"])
def test_tsv_has_no_quotes_and_no_other_line_ends(tmp_path, name):
    content = '\ufeff"a\tb "c"\trest\r\n\n\u2028x\x0b\té\n1\t2'
    write(tmp_path / name, content, PACK.get(name.split(".")[-1], bytes))
    assert read(tmp_path / name) == [('"a', 'b "c"'), ("\u2028x\x0b", "é"), ("1", "2")]


def test_tsv_columns_by_number_and_by_name(tmp_path):
    path = write(tmp_path / "a.tsv", "id\ten\tde\n1\tone\teins\n")
    assert read(path, "2", "3")[1] == ("one", "eins")
    for named in (("en", "de"), ("2", "3"), ("en", "3")):
        assert read(path, *named, tsv_header=True) == [("one", "eins")]
    write(path, "target\tsource\neins\tone\n")
    assert read(path, tsv_header=True) == [("one", "eins")]
    assert read(write(path, ""), tsv_header=True) == []


BAD_TSV = {
    "a\tb\nc\n": (r"line 2 has 1 column, but its target should be in column 2: put tabs", {}),
    "a\tb\tc\n": (r"line 1 has 3 columns, but its source should be in column 9", {"source": "9"}),
    "x\ty\nb\tc\n": (
        r"source_column=en names a column, but .* no header: .* set data\.tsv_header",
        {"source": "en"},
    ),
    "src\ttarget\nb\tc\n": (
        r"line 1 has no field 'source' but 'src', 'target'.* set data\.source_column to the one",
        {"tsv_header": True},
    ),
    "a\t0\n": (r"source_column=0 names a column", {"source": "0"}),
}


@pytest.mark.parametrize("content", BAD_TSV)
def test_bad_tsv_names_file_and_line(tmp_path, content):
    message, settings = BAD_TSV[content]
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path / "a.tsv", content), **settings)
    assert not isinstance(caught.value, BadRecord)
    assert "a.tsv" in str(caught.value)


def test_what_can_be_left_out_is_counted_or_an_error(tmp_path):
    lines = [b"a\tb", b"empty\t", b" \tempty", b"bad \xff\tb", b"c\td\xc3", b"last\tone"]
    path = write(tmp_path / "a.tsv", b"\n".join(lines))
    counts = Counts()
    assert read(path, counts=counts) == [("a", "b"), ("last", "one")]
    assert counts.skipped == 4
    for number, problem in (
        (2, "'target' is empty"),
        (4, "byte 4 of field 'source' is not valid UTF-8"),
        (5, "byte 1 of field 'target' is not"),
    ):
        write(path, lines[number - 1])
        with pytest.raises(UserError, match=rf"a\.tsv, line 1: .*{problem}.*on_bad=skip"):
            read(path, on_bad="error")


def test_json_lines_with_nested_fields_nulls_and_bad_text(tmp_path):
    rows = [
        {"translation": {"en": "one", "de": "eins"}},
        {"translation": {"en": "two", "de": None}},
        {"translation": {"en": "\ud800", "de": "drei"}},
        {"translation.en": "four", "translation": {"de": "vier"}},
    ]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b'{"a": "\xff"}\n'
    path = write(tmp_path / "a.jsonl", content)
    names, counts = ("translation.en", "translation.de"), Counts()
    assert read(path, *names, counts=counts) == [("one", "eins"), ("four", "vier")]
    assert counts.skipped == 3
    write(path, json.dumps({"translation": {"en": "one"}}))
    with pytest.raises(UserError, match=r"line 1 has no field 'translation\.de' but 'translation'"):
        read(path, *names)
    write(path, json.dumps({"source": ["one"], "target": "eins"}))
    with pytest.raises(UserError, match=r"line 1: field 'source' holds .*not a string"):
        read(path)
    write(path, "[]")
    with pytest.raises(UserError, match="write one with a field 'source' and 'target'"):
        read(path)


def test_parquet_with_nested_fields(tmp_path):
    rows = [{"en": f"one {n}", "de": f"eins {n}"} for n in range(100)]
    parquet.write_table(pyarrow.table({"pair": rows, "n": range(100)}), tmp_path / "a.parquet")
    read_back = read(tmp_path / "a.parquet", "pair.en", "pair.de")
    assert read_back == [(row["en"], row["de"]) for row in rows]
    with pytest.raises(UserError, match=r"a\.parquet has no field 'source' but 'pair', 'n'"):
        read(tmp_path / "a.parquet", target="pair.de")


def test_datasets_have_the_names_of_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"source": datasets.Value("string"), "target": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"source": ["a", "b", "c"], "target": [1, 0, -1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "d")
    counts = Counts()
    assert read(f"hf:{tmp_path}/d", counts=counts) == [("a", "good"), ("b", "bad")]
    assert counts.skipped == 1


def test_a_folder_of_several_formats_and_one_without_records(tmp_path):
    write(tmp_path / "a.tsv", "one\teins\n")
    write(tmp_path / "b.jsonl", '{"source": "two", "target": "zwei"}\n')
    assert read(tmp_path) == [("one", "eins"), ("two", "zwei")]
    write(tmp_path / "c.txt", "three\tdrei\n")
    with pytest.raises(UserError, match=r"c\.txt has no records .*: give \.tsv, .*hf:NAME"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.tsv.zst"])
def test_damaged_compression_names_the_file(tmp_path, name):
    content = b"".join(b"%d\t%d\n" % (n, n * n) for n in range(20_000))
    write(tmp_path / name, content, lambda data: PACK[name.split(".")[-1]](data)[:-9])
    with pytest.raises(UserError, match=rf"cannot read .*{name}: \w+"):
        read(tmp_path)
