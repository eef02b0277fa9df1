"""transformers' AutoTokenizer on the written files gives the ids and texts of jaxlm's tokenizer."""

import io
import json
import sysconfig
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.export.vocabulary import write_tokenizer
from jaxlm.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from jaxlm.tokenizer_training import train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
AWKWARD = [
    "",
    " ",
    "  leading, trailing  and   inner  ",
    "▁",
    "a▁b▁▁c ▁ d",
    "\0\x01\x7f\x85\u2028\ufeff\u3000",
    "line\r\nline\rline\n\n\n",
    "\tif x:\n\t\t    return\t\n",
    "😀👩‍👩‍👧 中文中文字 żółć e\u0301 \u0301 العربية \U0010ffff",
    "<0x0A><s></s><unk><pad>▁<0xE2>< s>",
    "<|endoftext|><|x|>\n<think><|endoftext|",
    "0123456789 3.14 x86_64",
    "ab" * 300,
]
TROUBLE = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    " ",
    "  ",
    "    ",
    "▁",
    "\n",
    "\r\n",
    "\t",
    "中",
    "é",
    "self",
]
LENIENT = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def code():
    for name in ("argparse", "ast", "heapq", "textwrap"):
        yield STDLIB.joinpath(f"{name}.py").read_text("utf-8")
    yield "\tif x:\n\t\treturn '中文'\n" * 50


def sentencepiece_model(texts=None, **options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts or [line for text in code() for line in text.splitlines()]),
        model_writer=out,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(out.getvalue())


def trained(kind, vocab_size):
    return train_tokenizer(code(), TokenizerConfig(kind=kind, vocab_size=vocab_size))


def byte_level(post_processor, add_prefix_space=False, **config):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>", "</s>", "<|x|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(code(), trainer)
    backend.add_tokens(["<think>"])
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.enable_truncation(8)
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    return HuggingFaceTokenizer(
        backend.to_str().encode(), config["bos_token"], config["eos_token"], config
    )


def with_normalizer():
    """Pieces with spaces, in the style of Llama 2's tokenizer.json."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁a", "ab"])}
    merges = [("▁", "a"), ("a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return HuggingFaceTokenizer(backend.to_str().encode())


def begin_and_end():
    return processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def begin_after_byte_level():
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = {"user_defined_symbols": ["<x>", "self"], "byte_fallback": True}
MAKERS = {
    "bpe-400": lambda: trained("bpe", 400),
    "bpe-2000": lambda: trained("bpe", 2000),
    "unigram-400": lambda: trained("unigram", 400),
    "unigram-1000": lambda: train_tokenizer(
        code(), TokenizerConfig(kind="unigram", vocab_size=1000)
    ),
    "llama-2": lambda: sentencepiece_model(
        model_type="bpe", vocab_size=600, byte_fallback=True, **IDENTITY
    ),
    "symbols": lambda: sentencepiece_model(
        model_type="bpe", vocab_size=600, add_dummy_prefix=False, **IDENTITY, **SYMBOLS
    ),
    "nfkc-bpe": lambda: sentencepiece_model(model_type="bpe", vocab_size=400),
    "t5": lambda: sentencepiece_model(
        model_type="unigram", vocab_size=500, bos_id=-1, pad_id=0, eos_id=1, unk_id=2
    ),
    "nfkc-symbols": lambda: sentencepiece_model(model_type="unigram", vocab_size=600, **SYMBOLS),
    "across-words": lambda: sentencepiece_model(
        model_type="bpe", vocab_size=600, split_by_whitespace=False, byte_fallback=True
    ),
    "characters": lambda: sentencepiece_model(model_type="char", vocab_size=80),
    # No piece has a character of <s> or <0x41>.
    "chinese": lambda: sentencepiece_model(
        ["中文字 国人 我们 他", "文字中 人国 他们"] * 50,
        model_type="unigram",
        vocab_size=269,
        byte_fallback=True,
        **IDENTITY,
    ),
    "gpt-2": lambda: byte_level(processors.ByteLevel(), add_prefix_space=True),
    "qwen": lambda: byte_level(None, bos_token="<|endoftext|>", eos_token="<think>"),
    "llama-3": lambda: byte_level(begin_after_byte_level()),
    "ends": lambda: byte_level(begin_and_end()),
    "llama-json": with_normalizer,
}


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """A tokenizer, and what transformers reads from its files."""
    tokenizer = MAKERS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text('{"model_type": "gemma2"}')
    write_tokenizer(tokenizer, folder, 512)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


all_of_them = pytest.mark.parametrize("both", MAKERS, indirect=True)


def is_unigram(tokenizer):
    kinds = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model).trainer_spec
    return kinds.model_type == kinds.UNIGRAM


def score(tokenizer, ids):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    return sum(processor.get_score(i) for i in ids)


def assert_equal(both, text):
    tokenizer, other = both
    ids = tokenizer.encode(text)
    first, *theirs = other(text).input_ids
    assert first == tokenizer.bos_id
    if theirs != ids:
        # A tie, which SentencePiece's float32 sums break by their rounding.
        assert is_unigram(tokenizer), text
        assert abs(score(tokenizer, theirs) - score(tokenizer, ids)) < 1e-3, text
    decoded = other.decode([first, *theirs], skip_special_tokens=True)
    assert decoded == tokenizer.decode(ids), text


@pytest.mark.parametrize("text", AWKWARD)
@all_of_them
def test_awkward_texts_have_the_same_ids(both, text):
    assert_equal(both, text)


# Several combining marks on one character are normalised otherwise, see the module.
CHARACTERS = st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me", "Cf"])


@LENIENT
@given(data=st.data())
@all_of_them
def test_any_text_has_the_same_ids(both, data):
    tokenizer, _ = both
    pieces = [piece.decode("utf-8", errors="ignore") for piece in tokenizer._bytes]
    normalises = b"nmt_nfkc" in tokenizer.model
    parts = st.sampled_from(TROUBLE + pieces) | (st.text(CHARACTERS) if normalises else st.text())
    assert_equal(both, data.draw(st.lists(parts, max_size=20).map("".join)))


@pytest.mark.parametrize("unit", ["a", " ", "\n", "▁", "中", "x = [1, 2] "])
@pytest.mark.parametrize("both", ["bpe-400", "unigram-400"], indirect=True)
def test_long_texts_stay_quick(both, unit):
    tokenizer, other = both
    text = unit * (300_000 // len(unit.encode()))
    start = time.monotonic()
    ids = other(text).input_ids
    assert time.monotonic() - start < 10
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text)]


@pytest.mark.parametrize("both", ["bpe-2000", "unigram-1000"], indirect=True)
def test_real_files_have_the_same_ids(both):
    for name in ("csv", "difflib", "json/decoder"):
        assert_equal(both, STDLIB.joinpath(f"{name}.py").read_text("utf-8"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("kind", ["bpe-400", "gpt-2"])
def test_ids_do_not_depend_on_the_kind_of_model(kind, model_type, tmp_path):
    tokenizer = MAKERS[kind]()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_tokenizer(tokenizer, tmp_path, 512)
    for text in AWKWARD:
        assert_equal((tokenizer, AutoTokenizer.from_pretrained(tmp_path)), text)


def test_files_name_tokens_and_length(tmp_path):
    tokenizer = MAKERS["bpe-400"]()
    write_tokenizer(tokenizer, tmp_path, 77)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.model
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert (other.bos_token, other.eos_token, other.unk_token) == ("<s>", "</s>", "<unk>")
    assert (other.model_max_length, len(other)) == (77, tokenizer.vocab_size)
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_foreign_config_is_kept_but_for_what_would_change_ids(tmp_path):
    tokenizer = byte_level(
        begin_after_byte_level(),
        chat_template="{{ messages }}",
        pad_token="<pad>",
        unk_token={"content": "<|x|>"},
        additional_special_tokens=["<think>", "<|x|>", "<new>"],
        added_tokens_decoder={"900": {"content": "self"}},
        tokenizer_class="GPT2Tokenizer",
        add_bos_token=False,
    )
    tokenizer.config["add_prefix_space"] = True
    write_tokenizer(tokenizer, tmp_path, 512)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert (other.chat_template, other.unk_token) == ("{{ messages }}", "<|x|>")
    assert (other.pad_token, len(other)) == (None, tokenizer.vocab_size)
    # With a chat template, special tokens in a text are found unless one asks for its letters.
    assert not other.split_special_tokens
    other.split_special_tokens = True
    assert_equal((tokenizer, other), "def self: <think><pad><|x|><new>")
    ours = json.loads(tokenizer.model) | {"truncation": None}
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8")) == ours


def test_what_cannot_be_expressed_is_an_error(tmp_path):
    with pytest.raises(UserError, match="of words cannot be exported"):
        words = [line.strip() for text in code() for line in text.splitlines()]
        write_tokenizer(sentencepiece_model(words, model_type="word", vocab_size=99), tmp_path, 9)
    with pytest.raises(UserError, match="treat_whitespace_as_suffix"):
        suffix = sentencepiece_model(vocab_size=500, treat_whitespace_as_suffix=True)
        write_tokenizer(suffix, tmp_path, 9)
