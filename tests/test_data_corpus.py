"""Preparing: what is kept and held out, the cache, other processes, and being killed."""

import argparse
import inspect
import json
import random
import re
import signal
import subprocess
import sys
import time
from itertools import chain

import numpy as np
import pytest

from jaxlm import prepare as command
from jaxlm.data import corpus
from jaxlm.data.corpus import prepare
from jaxlm.data_config import DataConfig, TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.tokenizer_training import train_tokenizer

WORDS = re.findall(r"\S+", "the quick brown fox jumps over a lazy dog; def f(x): return x # 中文 é")


def documents(count, seed=0, length=30):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) + f" {seed}.{n}\n" for n in range(count)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(documents(200)), TokenizerConfig(vocab_size=330)).save(folder)
    return TokenizerConfig(kind="file", path=str(folder))


@pytest.fixture
def run(tmp_path, tokenizer_config):
    """`prepare` with a cache of its own; the lines it reported are in `run.lines`."""

    def run(*train, tokenizer=tokenizer_config, **settings):
        run.lines = []
        data = DataConfig(train=train, **{"cache": str(tmp_path / "cache"), **settings})
        return prepare(data, tokenizer, run.lines.append)

    return run


def texts(tokenizer, file):
    """The documents of a token file, whose BOS and EOS are checked on the way."""
    pairs = zip(file.offsets[:-1], file.offsets[1:], strict=True)
    found = [file.tokens[start:end].tolist() for start, end in pairs]
    assert all((ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) for ids in found)
    return [tokenizer.decode(ids[1:-1]) for ids in found]


def test_documents_are_split_and_kept_in_order(run, tmp_path):
    everything = documents(400)
    prepared = run(write(tmp_path / "a.jsonl", everything), valid_fraction=0.1)
    (train,), (valid,) = prepared.train, prepared.valid
    kept, held_out = texts(prepared.tokenizer, train), texts(prepared.tokenizer, valid)
    assert 10 < len(held_out) < 90
    assert [text for text in everything if text not in set(held_out)] == kept
    assert sorted(kept + held_out) == sorted(everything)
    assert train.num_bytes == len("".join(kept).encode())


def test_copies_of_a_document_fall_on_the_same_side(run, tmp_path):
    prepared = run(write(tmp_path / "a.jsonl", documents(200) * 2), valid_fraction=0.2)
    kept = texts(prepared.tokenizer, prepared.train[0])
    held_out = texts(prepared.tokenizer, prepared.valid[0])
    assert not set(kept) & set(held_out)


def test_token_files_do_not_depend_on_workers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 2000)
    source = write(tmp_path / "a.jsonl", documents(500))
    one = run(source, workers=1)
    many = run(source, workers=5, cache=str(tmp_path / "other"))
    for a, b in zip(one.train + one.valid, many.train + many.valid, strict=True):
        assert a.path != b.path
        assert a.manifest == b.manifest
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_named_validation_text_leaves_training_text_whole(run, tmp_path):
    train = write(tmp_path / "a.jsonl", documents(30))
    valid = write(tmp_path / "b.jsonl", documents(7, seed=1))
    prepared = run(train, valid=(valid,))
    assert prepared.train[0].num_documents == 30
    assert [file.num_documents for file in prepared.valid] == [7]


def test_training_text_is_cut_anew_each_time_and_validation_text_never(run, tmp_path):
    source = write(tmp_path / "a.jsonl", [*documents(200), "bad \ud800"])
    plain = run(source, tokenizer=TokenizerConfig(vocab_size=330))
    cut = TokenizerConfig(vocab_size=330, dropout=0.3, dropout_cuts=3)
    found = run(source, tokenizer=cut)
    (file,), (wanted,) = found.train, plain.train
    assert texts(found.tokenizer, file) == texts(plain.tokenizer, wanted) * 3
    starts = file.offsets[:: len(wanted)]
    assert len({file.tokens[at : at + 40].tobytes() for at in starts[:3]}) == 3
    assert file.num_tokens > 3.1 * wanted.num_tokens
    assert file.num_skipped == wanted.num_skipped == 1
    assert found.valid[0].digest == plain.valid[0].digest
    assert run.lines[-1].endswith("each text to train on in pieces 3 times")
    assert run(source, tokenizer=cut, workers=3, cache=str(tmp_path / "b")).train[0].digest == (
        file.digest
    )


def test_several_sources_and_their_weights(run, tmp_path):
    sources = [write(tmp_path / f"{n}.jsonl", documents(5, seed=n)) for n in range(3)]
    prepared = run(*sources, weights=(1.0, 2.0, 3.0))
    assert prepared.weights == (1.0, 2.0, 3.0)
    assert len(prepared.train) == 3
    assert sum(file.num_documents for file in prepared.valid) >= 1


def test_the_cache_is_used_until_something_changes(run, tmp_path):
    source = write(tmp_path / "a.jsonl", documents(60))
    first = run(source)
    assert len(run.lines) == 1
    again = run(source, workers=3, prefetch=9)
    assert again.train[0].path == first.train[0].path
    assert re.fullmatch(r".*: [\d,]+ tokens from the cache, .* held out", *run.lines)
    changed = [run(source, valid_fraction=0.3), run(source, on_bad="error")]
    write(tmp_path / "a.jsonl", documents(61))
    changed.append(run(source))
    assert len({str(p.train[0].path) for p in (first, *changed)}) == 4
    assert changed[-1].train[0].num_documents + changed[-1].valid[0].num_documents == 61


def test_a_damaged_cache_is_rebuilt_and_said(run, tmp_path):
    source = write(tmp_path / "a.jsonl", documents(60))
    before = run(source).train[0]
    tokens = before.tokens.tolist()
    (before.path / "tokens.bin").write_bytes(b"short")
    after = run(source).train[0]
    assert after.tokens.tolist() == tokens
    assert "tokens.bin has 5 bytes" in run.lines[0]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_is_trained_once(run, tmp_path, kind):
    config = TokenizerConfig(kind=kind, vocab_size=320)
    source = write(tmp_path / "a.jsonl", inspect.getsource(argparse).split("\n\n"))
    first = run(source, tokenizer=config).tokenizer
    assert len(run.lines) == 2
    second = run(source, tokenizer=config).tokenizer
    assert (len(run.lines), first.vocab_size) == (1, 320)
    assert first.model == second.model


def test_the_training_sample_is_spread_evenly_and_bounded():
    texts = documents(3000, length=100)
    sample = corpus._sample(iter(texts), 100_000)
    assert 90_000 < len("".join(sample).encode()) <= 100_000
    places = [texts.index(text) for text in sample]
    assert places == sorted(places)
    assert np.histogram(places, bins=4, range=(0, 3000))[0].min() > len(places) / 6
    assert corpus._sample(iter(texts), 10**9) == texts


def test_a_tiny_corpus_still_holds_a_document_out(run, tmp_path):
    for count in (2, 3, 5):
        prepared = run(write(tmp_path / f"{count}.jsonl", documents(count)), valid_fraction=1e-9)
        assert [file.num_documents for file in prepared.train] == [count - 1]
        assert [file.num_documents for file in prepared.valid] == [1]


@pytest.mark.parametrize("copies", [1, 3])
def test_one_document_cannot_be_split(run, tmp_path, copies):
    source = write(tmp_path / "a.jsonl", documents(1) * copies)
    with pytest.raises(UserError, match=r"one document.*name validation text in data\.valid"):
        run(source, valid_fraction=1e-9)


def test_one_document_beside_bad_ones_cannot_be_split(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"too short to cut \(2 skipped as"):
        run(str(tmp_path / "a.jsonl"), valid_fraction=1e-9)


def test_an_empty_corpus_says_why(run, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 9)
    full = write(tmp_path / "full.jsonl", documents(9))
    with pytest.raises(
        UserError, match=r"'.*empty\.jsonl' in data\.train has no .*all it has is empty"
    ):
        run(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"'.*bad\.txt' in data\.train .*1 skipped as invalid"):
        run(full, str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match=r"'.*empty\.jsonl' in data\.valid has no document"):
        run(full, valid=(str(tmp_path / "empty.jsonl"),))
    with pytest.raises(UserError, match=r"in data\.train .*all 9 held out for validation"):
        run(full, valid_fraction=1 - 1e-9)


def test_an_empty_file_is_called_empty(run, tmp_path):
    full, folder = write(tmp_path / "full.jsonl", documents(9)), tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.tsv", "c.parquet"):
        (folder / name).touch()
    for train, valid, words in (
        (str(folder / "a.txt"), "", r"a\.txt': the file is empty \(0 bytes\)"),
        (full, str(folder / "b.tsv"), r"b\.tsv': the file is empty"),
        (str(folder), "", "folder': all 3 files are empty"),
    ):
        with pytest.raises(UserError, match=words):
            run(train, valid=(valid,) if valid else ())


def test_an_empty_corpus_says_why_before_the_tokenizer_is_learned(run, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 9)
    for source, cause in (
        (write(tmp_path / "empty.jsonl", ["", ""]), "all it has is empty or white space"),
        (write(tmp_path / "blank.jsonl", ["\n", " "]), "all it has is empty or white space"),
        (str(tmp_path / "bad.txt"), "1 skipped as invalid UTF-8"),
    ):
        with pytest.raises(UserError, match=rf"has no document with text left \({cause}"):
            run(source, tokenizer=TokenizerConfig(vocab_size=500))


@pytest.mark.parametrize("size", [20_000, 900_000])
@pytest.mark.parametrize("files", [1, 3])
def test_a_few_plain_texts_hold_out_little(run, tmp_path, size, files):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(files):
        (folder / f"{n}.txt").write_text("".join(documents(size // 150, seed=n)))
    prepared = run(str(folder))
    (train,), (valid,) = prepared.train, prepared.valid
    assert 0 < valid.num_bytes < 0.15 * (train.num_bytes + valid.num_bytes)
    number = valid.num_documents
    noun = "document" if number == 1 else "documents"
    assert run.lines[0].endswith(f", {number} {noun} ({valid.num_tokens:,} tokens) held out")


def test_a_cached_source_has_the_name_it_was_asked_by(run, tmp_path):
    source = write(tmp_path / "a.jsonl", documents(60))
    run(source)
    again = run(str(tmp_path / "*.jsonl"))
    assert "from the cache" in run.lines[0]
    assert again.train[0].manifest["source"] == str(tmp_path / "*.jsonl")


def test_skipped_documents_are_counted(run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, text in enumerate(documents(9)):
        (folder / f"{n}.txt").write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for _ in range(2):
        assert run(str(folder)).train[0].num_skipped == 1
        words = ", 1 document skipped as invalid UTF-8 or null (the first: "
        assert words in run.lines[0] and "picture.png: byte 0 is not valid UTF-8" in run.lines[0]
    with pytest.raises(UserError, match=r"picture\.png: byte 0 is not valid UTF-8"):
        run(str(folder), on_bad="error")


def test_an_error_in_the_middle_leaves_no_cache(run, tmp_path):
    source = write(tmp_path / "a.jsonl", documents(50))
    with open(source, "a") as file:
        file.write("not JSON\n")
    with pytest.raises(UserError, match="line 51 is not JSON"):
        run(source, valid_fraction=0.5)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_the_command_prints_a_summary(run, tmp_path, tokenizer_config, capsys):
    source = write(tmp_path / "a.jsonl", documents(50))
    command.main(
        [
            f"--data.train={source}",
            f"--data.cache={tmp_path}/cache",
            "--tokenizer.kind=file",
            f"--tokenizer.path={tokenizer_config.path}",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    summary = [line for line in lines if line.startswith(("train: ", "valid: "))]
    assert ["document" in line and "a token)" in line for line in summary] == [True, True]
    assert f"in {tmp_path}/cache/tokens-" in lines[2]


SCRIPT = """
import sys
from jaxlm.data_config import DataConfig, TokenizerConfig
from jaxlm.data.corpus import prepare
source, cache, tokenizer = sys.argv[1:]
data = DataConfig(train=(source,), cache=cache, workers=1)
print(prepare(data, TokenizerConfig(kind="file", path=tokenizer)).train[0].num_tokens)
"""


def start(source, cache, tokenizer_config):
    command = [sys.executable, "-c", SCRIPT, source, str(cache), tokenizer_config.path]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_midway_leaves_nothing_that_looks_complete(run, tmp_path, tokenizer_config):
    source = write(tmp_path / "a.jsonl", documents(20, length=100_000))
    cache = tmp_path / "cache"
    process = start(source, cache, tokenizer_config)
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size for f in cache.glob("*.partial/kept/tokens.bin")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".partial"]
    prepared = run(source)
    sides = [texts(prepared.tokenizer, file) for file in prepared.train + prepared.valid]
    assert sorted(chain(*sides)) == sorted(documents(20, length=100_000))
    assert not list(cache.glob("*.partial"))


def test_two_processes_at_once_prepare_the_same(tmp_path, tokenizer_config):
    source = write(tmp_path / "a.jsonl", documents(100, length=1000))
    processes = [start(source, tmp_path / "cache", tokenizer_config) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("tokens in" in output for output in outputs) == 1
