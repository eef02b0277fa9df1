"""BPE-dropout: without a rate SentencePiece's own pieces, with one others of the same text."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.cli import build_config
from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.tokenizer import SentencePieceTokenizer
from jaxlm.tokenizer_dropout import DropoutBPE
from jaxlm.tokenizer_training import train_tokenizer

TEXT = (
    "the cat sat on the mat, and the cattle stood; mats matter\n\tnot to the other cats  (12) é\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([TEXT] * 20), TokenizerConfig(vocab_size=330))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


@given(text=st.text(st.sampled_from("thecamsondr ,;\n\t12é中<s>/"), max_size=60))
def test_without_a_rate_the_pieces_are_those_of_sentencepiece(processor, text):
    assert DropoutBPE(processor, 0.0, 0).encode(text) == processor.encode(text)


@pytest.mark.parametrize("text", [TEXT, "a\u2581b \u2581", "  ", "", "中😀 <s></s>", "cat" * 5000])
def test_any_cut_is_the_same_text(tokenizer, text):
    for seed in range(4):
        assert tokenizer.decode(tokenizer.with_dropout(0.4, seed).encode(text)) == text


def test_cuts_differ_by_seed_and_text_and_by_nothing_else(tokenizer):
    cuts = [tokenizer.with_dropout(0.3, seed).encode(TEXT) for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]
    one, two = tokenizer.with_dropout(0.3, 0).encode_batch([TEXT, TEXT])
    assert one == two == cuts[0]


@pytest.mark.slow
def test_merges_are_left_out_at_the_rate_of_sentencepiece(tokenizer, processor):
    for rate in (0.1, 0.5):
        ours = [len(tokenizer.with_dropout(rate, n).encode(TEXT)) for n in range(300)]
        sampling = {"enable_sampling": True, "alpha": rate, "nbest_size": -1}
        theirs = [len(processor.encode(TEXT, **sampling)) for _ in range(300)]
        error = np.hypot(np.std(ours), np.std(theirs)) / 300**0.5
        assert abs(np.mean(ours) - np.mean(theirs)) < 5 * error
        assert np.mean(ours) > len(tokenizer.encode(TEXT)) + 5 * error


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"add_dummy_prefix": True},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_other_tokenizers_are_refused(changes):
    as_learnt_here = {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        vocab_size=32,
        minloglevel=2,
        **as_learnt_here | changes,
    )
    other = SentencePieceTokenizer(model.getvalue())
    with pytest.raises(UserError, match=r"dropout=0\.1 leaves out .* tokenizer\.model, is"):
        other.with_dropout(0.1, 0)


def test_a_tokenizer_that_a_run_starts_from_stays_where_only_dropout_is_given():
    below = {"tokenizer": {"kind": "file", "path": "theirs"}}
    config = build_config({}, {"tokenizer": {"dropout": 0.1}}, below=below)
    assert config.tokenizer == TokenizerConfig(kind="file", path="theirs", dropout=0.1)
    config = build_config({"tokenizer": {"vocab_size": 400, "dropout": 0.1}}, below=below)
    assert config.tokenizer == TokenizerConfig(vocab_size=400, dropout=0.1)


def test_every_token_is_counted_once():
    with pytest.raises(UserError, match=r"tokenizer\.dropout=0\.1 has no effect .* than ngram"):
        build_config({"model": {"kind": "ngram"}, "tokenizer": {"dropout": 0.1}})
    noisy = TokenizerConfig(vocab_size=400, dropout=0.1, dropout_cuts=2)
    assert noisy.without_dropout() == TokenizerConfig(vocab_size=400)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "unigram", "dropout": 0.1}, ["tokenizer.dropout=0.1", "tokenizer.kind=bpe"]),
        ({"dropout_cuts": 2}, ["tokenizer.dropout_cuts=2", "tokenizer.dropout"]),
    ],
)
def test_what_is_not_read_is_an_error(settings, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        TokenizerConfig(**settings)
