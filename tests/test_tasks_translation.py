"""Translation: what becomes of pairs, tags of languages, the held-out split, the cache."""

import json
import random
import re

import numpy as np
import pytest

from jaxlm.cli import build_config
from jaxlm.data.corpus import prepare
from jaxlm.errors import UserError
from jaxlm.nn.attention import Source
from jaxlm.tasks.build import batch_maker, make_form
from jaxlm.tasks.translation import encode_sources, reference_pairs
from jaxlm.tokenizer_training import train_tokenizer

WORDS = re.findall(r"\S+", "the quick brown fox jumps over a lazy dog 中文 é >>de<< x y")


def pairs(count, seed=0, mark="", length=6):
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(1, length))) for _ in range(count)]
    return [(f"{s} {n}", f"{mark}{s[::-1]} {n}") for n, s in enumerate(sentences)]


def write(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Prepare with a cache of its own; the lines it reported are in `run.lines`."""

    def run(*train, tokenizer=(), **settings):
        run.lines = []
        model = {"kind": "encoder_decoder", "max_seq_len": settings.pop("seq_len", 32)}
        data = {"train": list(train), "cache": str(tmp_path / "cache"), **settings}
        tokenizer = {"vocab_size": 320} | dict(tokenizer)
        config = build_config(
            {"task": "translation", "model": model, "data": data, "tokenizer": tokenizer}
        )
        run.config = config
        return prepare(config.data, config.tokenizer, run.lines.append, make_form(config))

    return run


def sides(prepared):
    """The pairs of text that the kept and the held-out examples decode to, with their tags."""
    names = {i: name for name, i in prepared.tokenizer.special_ids.items()}

    def decoded(file, index):
        arrays = file.example(index)
        source, targets = arrays["source"].tolist(), arrays["targets"].tolist()
        tag = (
            names[source.pop(0)]
            if source[0] != prepared.tokenizer.bos_id and len(prepared.form.names)
            else None
        )
        assert source[-1] == targets[-1] == prepared.tokenizer.eos_id
        assert arrays["tokens"].tolist() == [prepared.tokenizer.bos_id, *targets[:-1]]
        assert arrays["weights"].tolist() == [1] * len(targets)
        return prepared.tokenizer.decode(source), prepared.tokenizer.decode(targets), tag

    return [
        [decoded(file, index) for file in files for index in range(len(file))]
        for files in (prepared.train, prepared.valid)
    ]


def test_pairs_become_examples_and_come_back(run, tmp_path):
    rows = pairs(200)
    prepared = run(write(tmp_path / "a.tsv", rows), valid_fraction=0.1, seq_len=64)
    kept, held_out = sides(prepared)
    assert 5 < len(held_out) < 50
    assert sorted(kept + held_out) == sorted((*row, None) for row in rows)
    assert ">>de<<" not in prepared.tokenizer.special_ids
    assert "padding" in run.lines[-1]


def test_a_batch_has_both_sides(run, tmp_path):
    prepared = run(write(tmp_path / "a.tsv", pairs(50)), source_len=40, seq_len=48)
    rows = prepared.form.rows(prepared.train[0], 48)
    stacked = {name: np.stack([rows[0][name], rows[1][name]]) for name in rows[0]}
    batch = batch_maker(run.config, prepared)(stacked)
    assert isinstance(batch.source, Source)
    assert batch.source.tokens.shape == batch.source.places.segments.shape == (2, 40)
    assert batch.tokens.shape == batch.weights.shape == (2, 48)
    inside = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    inside &= batch.segment_ids[:, 1:] > 0
    np.testing.assert_array_equal(batch.targets[:, :-1][inside], batch.tokens[:, 1:][inside])
    np.testing.assert_array_equal(batch.weights > 0, batch.segment_ids > 0)
    assert batch.segment_ids.max() > 1, "nothing was packed"
    np.testing.assert_array_equal(batch.source.places.segments.max(1), batch.segment_ids.max(1))


def test_a_source_is_on_one_side_for_every_language(run, tmp_path):
    german, french = pairs(150, mark="de "), pairs(150, mark="fr ")
    files = [write(tmp_path / f"{n}.tsv", rows) for n, rows in enumerate((german, french))]
    prepared = run(*files, languages=["de", "fr"], valid_fraction=0.1, seq_len=64)
    assert prepared.form.names == ("de", "fr")
    kept, held_out = sides(prepared)
    assert not {source for source, _, _ in kept} & {source for source, _, _ in held_out}
    assert all(tag == f">>{target[:2]}<<" for _, target, tag in kept + held_out)
    assert len(kept) + len(held_out) == 300
    found = reference_pairs(prepared, 3)
    assert [pair.language for pair in found] == ["de"] * 3 + ["fr"] * 3
    assert all(pair.reference.startswith(pair.language) for pair in found)


def test_a_text_that_spells_a_tag_is_text(run, tmp_path):
    prepared = run(write(tmp_path / "a.tsv", pairs(80)), languages="de")
    tokenizer = prepared.tokenizer
    tag = tokenizer.special_ids[">>de<<"]
    (ids,) = encode_sources(tokenizer, [">>de<< a"], ["de"])
    assert ids[0] == tag
    assert tag not in ids[1:]
    assert tokenizer.decode(ids) == ">>de<< a"
    with pytest.raises(UserError, match=r"no special piece '>>it<<' for the language 'it'"):
        encode_sources(tokenizer, ["a"], ["it"])


def test_languages_from_a_column(run, tmp_path):
    rows = [
        {"source": s, "target": t, "lang": ("fr", "de")[n % 2]}
        for n, (s, t) in enumerate(pairs(60))
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = run(str(path), language_column="lang", seq_len=64)
    assert prepared.form.names == ("de", "fr")
    kept, held_out = sides(prepared)
    expected = [(row["source"], row["target"], f">>{row['lang']}<<") for row in rows]
    assert sorted(kept + held_out) == sorted(expected)

    def tagged(language):
        return write(tmp_path / "b.tsv", [(*pair, language) for pair in pairs(60)])

    other = write(tmp_path / "v.tsv", [("a", "b", "it")])
    with pytest.raises(UserError, match=r"v\.tsv, line 1: 'it' is not a target language .*'de'"):
        run(tagged("de"), valid=other, language_column="3")
    with pytest.raises(UserError, match="line 1: 'two words' cannot be a language"):
        run(tagged("two words"), language_column="3")


def test_languages_that_do_not_fit_their_sources(run, tmp_path):
    files = [write(tmp_path / f"{n}.tsv", pairs(5)) for n in range(3)]
    with pytest.raises(UserError, match=r"data\.languages has 2 languages for 3 sources"):
        run(*files, languages=["de", "fr"])
    with pytest.raises(UserError, match=r"for 1 sources in data\.valid: .* data\.valid_languages"):
        run(*files[:2], languages=["de", "fr"], valid=files[2])
    with pytest.raises(UserError, match=r"data\.valid_languages: 'it' is not a target language"):
        run(*files[:2], languages=["de", "fr"], valid=files[2], valid_languages="it")
    with pytest.raises(UserError, match=r"data\.language_column=3 names .* leave one of them out"):
        run(files[0], languages="de", language_column="3")
    with pytest.raises(UserError, match=r"valid_languages=.* no effect without a data\.valid"):
        run(files[0], languages="de", valid_languages="de")


def test_pairs_that_are_too_long_or_bad_are_counted_and_said(run, tmp_path):
    rows = [*pairs(40, length=2), ("word " * 50, "short"), ("short", "word " * 50), ("empty", "")]
    prepared = run(write(tmp_path / "a.tsv", rows), valid=write(tmp_path / "v.tsv", rows[:3]))
    (train,) = prepared.train
    assert (len(train), train.num_dropped, train.num_skipped) == (40, 2, 1)
    assert ", 2 left out as longer than 32 tokens (source) or 32 tokens (target)" in run.lines[1]
    assert ", 1 record skipped as empty, null or invalid UTF-8" in run.lines[1]
    long = [(source, target * 60) for source, target in pairs(60, length=30)]
    with pytest.raises(UserError, match=r"in data\.train has no record .*\(60 too long\): give it"):
        run(write(tmp_path / "b.tsv", long), valid=str(tmp_path / "v.tsv"))


def test_the_cache_is_used_until_something_changes(run, tmp_path):
    path = write(tmp_path / "a.tsv", pairs(60))
    first = run(path)
    again = run(path, workers=3)
    assert again.train[0].path == first.train[0].path
    assert "from the cache" in run.lines[0]
    assert len(run.lines) == 1
    others = [
        run(path, seq_len=40),
        run(path, source_len=20),
        run(path, languages="de"),
        run(path, source_column="2", target_column="1"),
    ]
    assert len({prepared.train[0].path for prepared in (first, *others)}) == 5
    assert run(path, cache=str(tmp_path / "new")).train[0].digest == first.train[0].digest


def test_a_loaded_tokenizer_needs_the_tags(run, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    texts = [text for pair in pairs(200) for text in pair]
    config = build_config({"tokenizer": {"vocab_size": 320}}).tokenizer
    loaded = {"kind": "file", "path": str(folder)}
    train_tokenizer(iter(texts), config, [">>fr<<"]).save(folder)
    path = write(tmp_path / "a.tsv", pairs(60))
    no_size = {"vocab_size": 4096}
    assert run(path, languages="fr", tokenizer=loaded | no_size).form.names == ("fr",)
    with pytest.raises(UserError, match=r"no special piece '>>de<<'"):
        run(path, languages="de", tokenizer=loaded | no_size)
