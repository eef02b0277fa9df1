"""Every form of source, and one sentence for every way it can be bad."""

import gzip
import json
import logging
import os
import sys
import tracemalloc

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from jaxlm.data import records, sources
from jaxlm.data.files import list_files, source_fingerprint
from jaxlm.data.records import Counts
from jaxlm.data.sources import read_documents
from jaxlm.data_config import DataConfig
from jaxlm.errors import UserError


def read(spec, counts=None, **settings):
    spec = str(spec)
    return list(read_documents(spec, DataConfig(train=(spec,), **settings), counts or Counts()))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(*texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def test_a_file_is_a_document(tmp_path):
    text = "one\r\n\ttwo\n\0 é ▁ \ufeff"
    assert read(write(tmp_path / "a.txt", text)) == [text]


def test_blank_texts_are_documents_only_beside_others(tmp_path):
    blank, more = write(tmp_path / "a.txt", " \n\n"), write(tmp_path / "b.txt", "\t\n")
    assert read(tmp_path) == read(blank) == []
    text = write(tmp_path / "c.txt", "one")
    assert read(tmp_path) == [path.read_text() for path in (blank, more, text)]


def test_a_folder_is_read_recursively_and_sorted(tmp_path):
    for name in ("b/z.md", "b/a", "a.txt", ".hidden", ".git/config", "b/empty"):
        write(tmp_path / name, "" if name == "b/empty" else name)
    write(tmp_path / "c.jsonl", json_lines("in json"))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read(tmp_path) == ["a.txt", "in json", "b/a", "b/z.md"]


def test_a_glob_takes_the_files_that_match(tmp_path):
    for name in ("a.txt", "b.txt", "b.md", "deep/c.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "deep/c.txt"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_plain_and_compressed(tmp_path, name):
    content = ("\ufeff" + json_lines("é\n", "", "two\u2028", field="body") + "\n").encode()
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    write(tmp_path / name, pack(content))
    assert read(tmp_path / name, text_field="body") == ["é\n", "two\u2028"]


def test_compressed_text_with_several_frames(tmp_path):
    write(tmp_path / "a.gz", gzip.compress(b"one ") + gzip.compress(b"two"))
    write(tmp_path / "b.txt.zst", zstandard.compress(b"one ") + zstandard.compress(b"three"))
    assert read(tmp_path) == ["one two", "one three"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet(tmp_path, kind):
    texts = [f"é{i}" for i in range(200)]
    table = pyarrow.table({"n": range(200), "text": pyarrow.array(texts, kind)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    assert read(tmp_path / "a.parquet") == texts


def test_datasets_on_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    saved.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"dev": saved}).save_to_disk(tmp_path / "splits")
    write(tmp_path / "files" / "train.jsonl", json_lines("three"))
    assert read(f"hf:{tmp_path}/plain") == ["one", "two"]
    assert read(f"hf:{tmp_path}/splits:dev") == ["one", "two"]
    assert read(f"hf:{tmp_path}/files:train") == ["three"]
    assert source_fingerprint(f"hf:{tmp_path}/plain") == source_fingerprint(f"hf:{tmp_path}/plain")
    with pytest.raises(UserError, match=r"plain has no field 'body' but 'text', 'n'"):
        read(f"hf:{tmp_path}/plain", text_field="body")
    with pytest.raises(UserError, match=r"row 1: field 'n' holds '1', which is not"):
        read(f"hf:{tmp_path}/plain", text_field="n")
    with pytest.raises(UserError, match=r"nowhere' cannot be loaded: there is no such file"):
        read(f"hf:{tmp_path}/nowhere")


def test_datasets_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets, or 'jaxlm\[hf\]'"):
        read("hf:some/name")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "propagate", True)
    logger.setLevel(logging.WARNING)

    def load(*args, **settings):
        logging.getLogger("huggingface_hub.utils._http").warning("attempt 1 failed")
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"'hf:some/name' cannot be loaded: no network$"):
        read("hf:some/name")
    assert not caplog.records


def test_stdlib_is_python_source_without_tests():
    files = [str(f) for f in list_files("stdlib")]
    assert any(f.endswith("argparse.py") for f in files)
    assert not [f for f in files if "/test/" in f or "-packages" in f or not f.endswith(".py")]
    assert source_fingerprint("stdlib") == source_fingerprint("stdlib")


def test_fingerprint_changes_with_the_files(tmp_path):
    seen = set()
    write(tmp_path / "a", "one")
    seen.add(source_fingerprint(str(tmp_path)))
    os.utime(tmp_path / "a", ns=(1, 1))
    seen.add(source_fingerprint(str(tmp_path)))
    write(tmp_path / "b", "")
    seen.add(source_fingerprint(str(tmp_path)))
    assert len(seen) == 3


@pytest.mark.parametrize("line", ["line\n" * 9, "中文" * 12, "a"])
def test_huge_text_is_cut_at_lines_or_characters(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 64)
    text = line * 20
    counts = Counts()
    documents = read(write(tmp_path / "a", text), counts)
    assert "".join(documents) == text
    assert counts.skipped == 0
    assert max(len(d.encode()) for d in documents) <= 64
    if "\n" in line:
        assert all(d.endswith("\n") for d in documents)


def test_one_text_of_a_small_source_is_cut_to_hold_some_out(tmp_path):
    line = "twenty bytes a line\n"
    write(tmp_path / "novel.txt", line * 40_000)
    documents = read(tmp_path)
    assert "".join(documents) == line * 40_000
    assert {len(d) for d in documents[:-1]} == {12_500 // 20 * 20}
    assert len(read(tmp_path, valid=("stdlib",))) == 1
    write(tmp_path / "short.txt", line * 250)
    assert [len(d) for d in read(tmp_path / "short.txt")] == [2040, 2040, 920]
    write(tmp_path / "bad.txt", line * 250 + "\n")
    with (tmp_path / "bad.txt").open("ab") as file:
        file.write(b"\xff")
    assert read(tmp_path / "bad.txt", counts := Counts()) == []
    assert counts.skipped == 1


def test_memory_does_not_grow_with_the_file(tmp_path):
    write(tmp_path / "a.gz", gzip.compress(b"twelve bytes" * (4 << 20), compresslevel=1))
    tracemalloc.start()
    size = sum(map(len, read_documents(str(tmp_path), DataConfig(), Counts())))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 12 * (4 << 20)
    assert peak < 6 * sources.MAX_DOCUMENT_BYTES


BAD_UTF8 = {
    "a.txt": (b"good \xff bad", "byte 5"),
    "a.jsonl": (b'{"text": "fine"}\n{"text": "\xc3"}\n', "line 2: byte 27"),
    "b.jsonl": (b'{"text": "\\ud800"}', "line 1: byte 0"),
}


@pytest.mark.parametrize("name", BAD_UTF8)
def test_invalid_utf8_is_counted_or_an_error(tmp_path, name):
    content, place = BAD_UTF8[name]
    write(tmp_path / name, content)
    counts = Counts()
    assert read(tmp_path, counts) == (["fine"] if name == "a.jsonl" else [])
    assert counts.skipped == 1
    with pytest.raises(UserError, match=rf"{name}.*{place} is not valid UTF-8"):
        read(tmp_path, on_bad="error")


def test_invalid_utf8_in_parquet_is_counted_or_an_error(tmp_path):
    offsets = pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1]
    texts = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"ok\xff\xfe"))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    counts = Counts()
    assert read(tmp_path, counts) == ["ok"]
    assert counts.skipped == 1
    with pytest.raises(
        UserError, match=r"a\.parquet, row 2: byte 0 of field 'text' is not valid UTF-8"
    ):
        read(tmp_path, on_bad="error")


def test_offset_counts_from_the_start_of_a_cut_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 16)
    write(tmp_path / "a", b"0123456789\n" * 3 + b"\xff")
    with pytest.raises(UserError, match="byte 33 is not valid"):
        read(tmp_path, on_bad="error")


BAD_JSON = {
    '{"text": "a"}\n{"text": ': r"line 2 is not JSON \(Expecting value\): write",
    '["text"]': "line 1 is not a JSON object",
    "[" * 100_000: "line 1 is not JSON",
    '\n\n{"txt": "a", "id": 1}': "line 3 has no field 'text' but 'txt', 'id'",
    '{"text": 7}': "line 1: field 'text' holds '7', which is not a string",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=BAD_JSON.values())
def test_bad_json_names_file_and_line(tmp_path, content):
    write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=rf"a\.jsonl, {BAD_JSON[content]}"):
        read(tmp_path)


def test_json_in_one_huge_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)
    write(tmp_path / "a.jsonl", "x" * (1 << 21))
    with pytest.raises(UserError, match="line 1 is longer than 1 MiB"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_damaged_compression_names_the_file(tmp_path, name, damage):
    content = json_lines(*map(str, range(20_000))).encode()
    packed = (gzip if name.endswith("gz") else zstandard).compress(content)
    write(tmp_path / name, packed[:-9] if damage == "cut" else content)
    with pytest.raises(UserError, match=rf"cannot read .*{name}: \w+"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 not really PAR1"])
def test_damaged_parquet_names_the_file(tmp_path, content):
    write(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: \w+"):
        read(tmp_path)


def test_parquet_without_the_text(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1], "gap": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no field 'text' but 'id', 'gap'"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: field 'id' holds '1', which is not"):
        read(tmp_path, text_field="id")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    assert read(tmp_path, counts := Counts()) == ["x"]
    assert counts.skipped == 1
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field 'text' is null, not a string"):
        read(tmp_path, on_bad="error")


def test_a_source_that_is_not_there(tmp_path, monkeypatch):
    write(tmp_path / "corpus.txt", "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("gone.txt")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "corpsu.txt": r"there is no such file or folder; did you mean '.*/corpus\.txt'",
        "empty": "the folder has no file",
        "*.md": "no file matches",
        "emp*": r"it matches the folder .*/empty and no file: name the folder",
        "link": r"it is a link to gone\.txt, which does not exist$",
        "corpus.txt,b": r"; a list is written \[.*/corpus\.txt,b\]$",
        "pipe": "neither a file nor a folder",
    }
    for name, message in cases.items():
        for reader in (read, source_fingerprint):
            with pytest.raises(UserError, match=message):
                reader(str(tmp_path / name))
    (tmp_path / "lab.tsv").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'stdlib'"):
        read("stdlb")
