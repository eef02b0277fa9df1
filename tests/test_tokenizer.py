"""Exact round trips, special tokens as plain text, and every way a tokenizer file can be wrong."""

import io
import json
import pickle
import re
import sysconfig
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.tokenizer import load_tokenizer
from jaxlm.tokenizer_training import train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SMALL = {"vocab_size": 600}


def code():
    """A few hundred kB of Python source, with some Chinese."""
    names = ("argparse", "ast", "dataclasses", "heapq", "inspect", "textwrap")
    yield from (STDLIB.joinpath(f"{name}.py").read_text("utf-8") for name in names)
    yield "\tif x:\n\t\treturn '中文'\n" * 50


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return train_tokenizer(code(), TokenizerConfig(kind=request.param, **SMALL))


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE in the style of GPT-2, as the text of a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(code(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(8)
    return tokenizer.to_str()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


AWKWARD = [
    "",
    " ",
    "  leading, trailing  and   inner  ",
    "▁",
    "a▁b▁▁c ▁ d",
    "\0\x01\x7f\x85\u2028\ufeff",
    "line\r\nline\rline\n\n\n",
    "\tif x:\n\t\t    return\t\n",
    "😀👩‍👩‍👧 中文 żółć é e\u0301 \U0010ffff",
    "<0x0A><s></s><unk><pad>▁<0xE2>",
    "0123456789 3.14 x86_64",
    "\u2585\ufffd\ufffe",
]
# Hypothesis rarely draws these by itself.
TROUBLE = st.sampled_from([*AWKWARD, " ", "\n", "    ", "▁", "<s>", "<0x0A>", "def f(x):\n"])
TEXT = st.lists(TROUBLE | st.text()).map("".join)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXT)
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()
    assert not {trained.bos_id, trained.eos_id, 0} & set(ids)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXT)
def test_byte_level_json_brings_any_text_back(byte_level, tmp_path_factory, text):
    file = write(tmp_path_factory.getbasetemp() / "tokenizer.json", byte_level)
    tokenizer = load_tokenizer(file)
    ids = tokenizer.encode(text + "<|endoftext|>")
    assert tokenizer.decode(ids) == text + "<|endoftext|>"
    assert tokenizer.bos_id not in ids


@pytest.mark.parametrize("unit", ["a", " ", "\n", "▁", "中", "x = [1, 2] "])
def test_a_megabyte_on_one_line_takes_seconds(trained, unit):
    text = unit * (1_000_000 // len(unit.encode()))
    start = time.process_time()  # what else the machine does is not its fault
    assert trained.decode(trained.encode(text)) == text
    assert time.process_time() - start < 10


@pytest.mark.parametrize("trained", ["bpe", "unigram"], indirect=True)
def test_training_twice_gives_the_same_bytes(trained, request):
    kind = request.node.callspec.params["trained"]
    assert train_tokenizer(code(), TokenizerConfig(kind=kind, **SMALL)).model == trained.model


def test_long_texts_are_encoded_as_if_in_one_stretch(trained, request):
    text = "".join(code())[:50_000]
    whole = sentencepiece.SentencePieceProcessor(model_proto=trained.model).encode(text)
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    if request.node.callspec.params["trained"] == "bpe":
        assert ids == whole
    else:  # its scores are sums in float32, whose rounding grows along a text
        assert abs(len(ids) - len(whole)) < 5


def test_learns_indents_newlines_and_splits_digits(trained):
    assert trained.vocab_size == SMALL["vocab_size"]
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    assert len(trained.encode("        ")) == 1
    assert len(trained.encode("\n")) == len(trained.encode("\t")) == 1
    assert len(trained.encode("2024")) == 4


def test_many_rare_characters_fit_a_small_vocabulary():
    chinese = "".join(chr(0x4E00 + i) for i in range(5000))
    tokenizer = train_tokenizer(iter([chinese, *code()]), TokenizerConfig(vocab_size=400))
    assert tokenizer.decode(tokenizer.encode(chinese)) == chinese


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_little_text_names_a_vocabulary_that_works(kind):
    text = "".join(code())[:8000]
    with pytest.raises(UserError, match=r"vocab_size=60000.*to \d+ or less, or") as caught:
        train_tokenizer(iter([text]), TokenizerConfig(kind=kind, vocab_size=60000))
    largest = int(re.search(r"to (\d+) or", str(caught.value))[1])
    assert train_tokenizer(iter([text]), TokenizerConfig(kind=kind, vocab_size=largest))


@pytest.mark.parametrize("texts", [[], [""], ["x"]])
def test_no_text_is_an_error(texts, capfd):
    with pytest.raises(
        UserError, match=r"give it more text.*, or take a tok.* or by init_from and"
    ):
        train_tokenizer(iter(texts), TokenizerConfig())
    assert capfd.readouterr() == ("", "")


def test_a_size_too_small_for_special_tokens_or_too_large_for_the_text_says_so():
    tags = [f">>{i}<<" for i in range(45)]
    with pytest.raises(
        UserError, match=r"vocab_size=300 is too small: .* set it to \d+ or more"
    ) as e:
        train_tokenizer(code(), TokenizerConfig(vocab_size=300), tags)
    least = int(re.search(r"(\d+) or more", str(e.value))[1])
    assert train_tokenizer(code(), TokenizerConfig(vocab_size=least), tags).vocab_size == least
    with pytest.raises(UserError, match=r"more text .300 tokens, of them 256 bytes, are the least"):
        train_tokenizer(iter(["hello"]), TokenizerConfig(vocab_size=300))


def test_lone_surrogates_are_a_user_error(trained, byte_level, tmp_path):
    for tokenizer in (trained, load_tokenizer(write(tmp_path / "tokenizer.json", byte_level))):
        with pytest.raises(UserError, match="character 2 of the text"):
            tokenizer.encode("ab\ud800")


def test_special_ids_decode_to_nothing_and_broken_characters_to_a_mark(trained):
    ids = trained.encode("é")
    assert trained.decode([trained.bos_id, *ids, trained.eos_id, 0, 10**6]) == "é"
    assert trained.decode(trained.encode("\U0010ffff")[:-1]) == "\ufffd"


def test_saves_byte_for_byte_and_pickles(trained, tmp_path):
    trained.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == trained.model
    for again in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.model"),
        pickle.loads(pickle.dumps(trained)),
    ):
        assert again.fingerprint == trained.fingerprint
        assert again.encode("def f(x):\n") == trained.encode("def f(x):\n")


def test_json_without_named_specials_uses_endoftext_for_both(byte_level, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", byte_level))
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    ids = tokenizer.encode("one two three four five six seven eight nine ten")
    assert len(ids) > 8, "truncated as the file says"
    assert 0 not in ids, "added the special tokens of the file's template"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert (again.bos_id, again.encode("abc")) == (0, tokenizer.encode("abc"))


def test_json_takes_specials_from_its_config_and_saves_them(byte_level, tmp_path):
    spec = json.loads(byte_level)
    for n, name in enumerate(("<start>", "<stop>")):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 500 + n, "content": name})
    write(tmp_path / "tokenizer.json", json.dumps(spec))
    names = {"bos_token": {"content": "<start>"}, "eos_token": "<stop>"}
    write(tmp_path / "tokenizer_config.json", json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (500, 501, 502)
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    assert (copy / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert load_tokenizer(copy).eos_id == 501


def test_json_keeps_its_config_and_chat_template(byte_level, tmp_path):
    write(tmp_path / "tokenizer.json", byte_level)
    write(tmp_path / "chat_template.jinja", "{{ 'naïve' }}")
    write(tmp_path / "tokenizer_config.json", '{"padding_side": "left", "chat_template": "old"}')
    copy = tmp_path / "copy"
    copy.mkdir()
    load_tokenizer(tmp_path).save(copy)
    kept = {"padding_side": "left", "chat_template": "{{ 'naïve' }}"}
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert json.loads((copy / "tokenizer_config.json").read_bytes()) == kept | names
    again = pickle.loads(pickle.dumps(load_tokenizer(copy)))
    assert again.config == kept | names


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"bos_token": {}}', b"\xff\xfe"])
def test_a_corrupt_config_is_a_corrupt_tokenizer(byte_level, tmp_path, name, content):
    write(tmp_path / "tokenizer.json", byte_level)
    write(tmp_path / name, content)
    if name.endswith("jinja") and isinstance(content, str):
        assert load_tokenizer(tmp_path).config["chat_template"] == content
        return
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_prefix_is_what_the_own_post_processing_puts_in_front(trained, byte_level, tmp_path):
    assert trained.prefix == [trained.bos_id]
    file = write(tmp_path / "tokenizer.json", byte_level)
    assert load_tokenizer(file).prefix == [0]
    plain = json.loads(byte_level) | {"post_processor": None}
    assert load_tokenizer(write(file, json.dumps(plain))).prefix == []


def test_text_never_becomes_the_end_token_even_if_the_file_calls_it_plain(byte_level, tmp_path):
    spec = json.loads(byte_level)
    spec["added_tokens"][0]["special"] = False
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", json.dumps(spec)))
    ids = tokenizer.encode("a<|endoftext|>")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>"


def sentencepiece_model(**settings):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in code() for line in text.splitlines()),
        model_writer=out,
        vocab_size=500,
        minloglevel=2,
        **settings,
    )
    return out.getvalue()


def test_a_foreign_model_loses_its_leading_space_again(tmp_path):
    tokenizer = load_tokenizer(
        write(tmp_path / "m.model", sentencepiece_model(byte_fallback=True, model_type="bpe"))
    )
    assert tokenizer.decode(tokenizer.encode("import os")) == "import os"


def test_a_model_without_bos_starts_documents_with_eos(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "m.model", sentencepiece_model(bos_id=-1)))
    assert tokenizer.bos_id == tokenizer.eos_id >= 0


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.model: No such file"):
        load_tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(UserError, match=r"none of tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["m.model", "m.json"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"{}", b"\xff\xfe"])
def test_a_corrupt_tokenizer_is_named(tmp_path, name, content):
    with pytest.raises(UserError, match=f"{name} is not a tokenizer"):
        load_tokenizer(write(tmp_path / name, content))


def test_unsupported_tokenizers_say_what_would_be_right(tmp_path, byte_level):
    with pytest.raises(UserError, match=r"m\.txt should end in \.model, \.json or \.spm"):
        load_tokenizer(write(tmp_path / "m.txt", b"x"))
    with pytest.raises(UserError, match=r"m\.model has no <s> or </s>"):
        model = sentencepiece_model(bos_id=-1, eos_id=-1)
        load_tokenizer(write(tmp_path / "m.model", model))
    with pytest.raises(UserError, match=r"m\.json names no begin-of-sequence token"):
        load_tokenizer(write(tmp_path / "m.json", byte_level.replace("<|endoftext|>", "<odd>")))
    spec = json.loads(byte_level) | {"decoder": None}
    with pytest.raises(UserError, match=r"m\.json decodes by joining words"):
        load_tokenizer(write(tmp_path / "m.json", json.dumps(spec)))


def test_a_whole_text_has_the_ends_of_its_tokenizer(trained, tmp_path, byte_level):
    assert trained.ends == ([trained.bos_id], [trained.eos_id])
    file = write(tmp_path / "tokenizer.json", byte_level)
    assert load_tokenizer(file).ends == ([0], [])
    write(file, json.dumps(json.loads(byte_level) | {"post_processor": None}))
    assert load_tokenizer(file).ends == ([0], [0])  # it adds none itself
