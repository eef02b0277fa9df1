"""Tokenizers of folders that transformers publishes as SentencePiece models: Marian's and T5's."""

import io
import json
import pickle
import re

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

import jaxlm
from jaxlm.chat import with_template
from jaxlm.errors import UserError
from jaxlm.export import __main__ as command
from jaxlm.export.expected import TEXTS
from jaxlm.tokenizer import load_tokenizer

ENGLISH = "once upon a time there was model and it had to be the same everywhere , . you de good"
GERMAN = "es war einmal ein modell und so überall gleich sein musste , . gut der die das tag"
# Text of one side, both, neither, and what neither has pieces for.
OTHERS = ("good day , überall", "ü", " twice  the  space ", "a\tb\nc", "ﬁ ①", "abc 😀 xyz")
SIZES = {"d_model": 24, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0, "d_kv": 6, "d_ff": 40}
MARIAN = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 128,
    "activation_function": "swish",
    "scale_embedding": True,
    "init_std": 0.3,
}


def sentence_piece(words: str, **options) -> bytes:
    draw = np.random.default_rng(len(words))
    texts = [" ".join(draw.choice(words.split(), 12)) for _ in range(200)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


def pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    return [processor.id_to_piece(i) for i in range(len(processor))]


def random_model(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """A folder as Helsinki-NLP publishes them."""
    folder = tmp_path_factory.mktemp("marian")
    sides = {
        "source.spm": sentence_piece(ENGLISH, vocab_size=70),
        "target.spm": sentence_piece(GERMAN, vocab_size=60),
    }
    known = {piece for model in sides.values() for piece in pieces(model)}
    names = ["</s>", "<unk>", *sorted(known - {"</s>", "<unk>", "<s>"}), ">>de<<", ">>fr<<"]
    # A piece of source.spm that the table lacks.
    names = [name for name in names if name != "\u2581upon"] + ["<pad>"]
    for name, model in sides.items():
        (folder / name).write_bytes(model)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    pad = len(names) - 1
    config = transformers.MarianConfig(
        **MARIAN,
        vocab_size=len(names),
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=0,
        forced_eos_token_id=None,
        add_bias_logits=False,
    )
    model = random_model(transformers.MarianMTModel, config)
    model.generation_config.bad_words_ids = [[pad]]
    with torch.no_grad():
        model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias))
        model.final_logits_bias[0, pad] += 8  # what is forbidden would be written
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    options = {"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    model = sentence_piece(f"{ENGLISH} {GERMAN}", **options)
    (folder / "spiece.model").write_bytes(model)
    config = transformers.T5Config(**SIZES, vocab_size=len(pieces(model)) + 104)
    model = random_model(transformers.T5ForConditionalGeneration, config)
    model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(folder)
    return folder


def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_marian_encodes_sources_and_targets_by_their_own_pieces(marian):
    ours, other = load_tokenizer(marian), theirs(marian)
    assert isinstance(other, transformers.MarianTokenizer)
    for text in (*TEXTS, *OTHERS, ENGLISH, GERMAN):
        source = [*ours.source.encode(text), *ours.suffix]
        assert source == other(text, split_special_tokens=True).input_ids, text
        target = [*ours.encode(text), ours.eos_id]
        assert target == other(text_target=text, split_special_tokens=True).input_ids, text
        assert ours.decode(target).strip() == other.decode(target, skip_special_tokens=True), text
    assert ours.source.encode(ENGLISH) != ours.encode(ENGLISH)
    assert ours.special_ids[">>fr<<"] == other.convert_tokens_to_ids(">>fr<<")
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (other.pad_token_id, 0, len(other))


def test_marian_comes_back_from_a_folder_and_a_pickle(marian, tmp_path):
    ours = load_tokenizer(marian / "source.spm")
    ours.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert copy.fingerprint == ours.fingerprint
        assert copy.encode(GERMAN) == ours.encode(GERMAN)
        assert copy.source.encode(ENGLISH) == ours.source.encode(ENGLISH)
    (tmp_path / "vocab.json").write_text('{"</s>": 0}')
    with pytest.raises(UserError, match=r"has no piece <unk> in its vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "target.spm").unlink()
    with pytest.raises(UserError, match="is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_marian_has_no_place_for_a_chat_template(marian):
    with pytest.raises(UserError, match=r"source\.spm has no place for a chat template: use"):
        with_template(load_tokenizer(marian))


def test_t5_has_its_ids_and_a_hundred_more(t5):
    ours, other = load_tokenizer(t5), theirs(t5)
    assert isinstance(other, transformers.T5Tokenizer)
    for text in (*TEXTS, *OTHERS):
        wanted = other(text, split_special_tokens=True).input_ids
        assert [*ours.encode(text), *ours.suffix] == wanted, text
        assert ours.decode(wanted) == other.decode(wanted, skip_special_tokens=True), text
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (0, 1, 0, len(other))
    assert ours.special_ids["<extra_id_0>"] == ours.vocab_size - 1
    assert ours.special_ids["<extra_id_99>"] == ours.vocab_size - 100
    assert ours.special_ids["<extra_id_7>"] == other.convert_tokens_to_ids("<extra_id_7>")


def test_a_spiece_model_of_others_is_read_as_it_is(tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentence_piece(ENGLISH, vocab_size=60))
    ours = load_tokenizer(tmp_path)
    assert ours.bos_id == 1 and "<extra_id_0>" not in ours.special_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_translations_are_those_of_transformers(name, request, capsys):
    folder = request.getfixturevalue(name)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts = ["the same model", "once upon a time , you", "good"]
    target, other, loaded = None, theirs(folder), jaxlm.load(folder)
    start = model.generation_config.decoder_start_token_id
    inputs = [other(text, return_tensors="pt").input_ids for text in texts]
    if name == "marian":
        target, tag = "fr", torch.tensor([[other.convert_tokens_to_ids(">>fr<<")]])
        inputs = [torch.cat([tag, ids], 1) for ids in inputs]
    for beams in (1, 3):
        search = {"length_penalty": 0.6} if beams > 1 else {}
        made = jaxlm.translate(loaded, texts, target, num_beams=beams, max_new_tokens=8)
        for ids, text in zip(inputs, made, strict=True):
            found = model.generate(ids, num_beams=beams, max_new_tokens=8, **search)[0]
            wanted = other.decode(found, skip_special_tokens=True)
            # A tag is no text here.
            assert text.strip() == re.sub(">>(de|fr)<<", "", wanted).strip()
    scores = jaxlm.score(loaded, made, texts, target=target)
    for ids, text, score in zip(inputs, made, scores, strict=True):
        labels = other(text_target=text, return_tensors="pt").input_ids
        reads = torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1)
        logits = model(input_ids=ids, decoder_input_ids=reads).logits.log_softmax(-1)
        wanted = logits.gather(2, labels[..., None]).sum().item()
        assert score.logprob == pytest.approx(wanted, rel=1e-4)
    assert command.main(["--check", str(folder)]) == 0
    assert "verified: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_they_are_written_with_a_tokenizer_of_the_same_ids(name, request, tmp_path):
    folder, out = request.getfixturevalue(name), tmp_path / "out"
    report = jaxlm.export_checkpoint(folder, "hf", out)
    assert report.verified, report.reason
    before, after = load_tokenizer(folder), load_tokenizer(out)
    assert (before.bos_id, before.special_ids) == (after.bos_id, after.special_ids)
    assert (out / "source.spm").exists() == (name == "marian")
