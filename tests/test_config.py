"""The experiment's dataclasses: checked, and no field that could be ignored in silence."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli import build_config, read_config
from jaxlm.config import Config, OptimConfig
from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))


def refused(fragments, **sections):
    """Check that a config is refused in one sentence that has every fragment."""
    with pytest.raises(UserError) as caught:
        build_config(sections)
    sentence = str(caught.value)
    assert "\n" not in sentence
    missing = [fragment for fragment in fragments if fragment not in sentence]
    assert not missing, f"{missing} not in {sentence!r}"


def test_reading_a_config_does_not_import_jax():
    code = "import sys, jaxlm.config, jaxlm.cli, jaxlm.presets; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_short_and_valid(path):
    assert len(path.read_text().splitlines()) <= 40
    read_config(path)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3


def test_derived_sizes():
    assert (ModelConfig().kv_heads, ModelConfig().head_size) == (4, 24)
    assert ModelConfig(num_kv_heads=None).kv_heads == 8
    assert ModelConfig(head_dim=10).head_size == 10


UNKNOWN = {
    "optim.learning_rat": "optim.learning_rate",
    "train.batchsize": "train.batch_size",
    "train.learning_rate": "optim.learning_rate",
    "model.rope_scaling.fctor": "model.rope_scaling.factor",
    "batch_size": "train.batch_size",
    "modle": "model",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_key_names_the_nearest(key):
    sections = 1
    for name in reversed(key.split(".")):
        sections = {name: sections}
    refused([f"unknown key {key!r}", f"did you mean {UNKNOWN[key]!r}"], **sections)


def test_unknown_key_near_nothing_lists_its_section():
    refused(["'data.zzz'", "data has train, weights, valid"], data={"zzz": 1})


WRONG_VALUES = [
    ({"train": {"steps": 0}}, ["train.steps=0", "greater than or equal to 1"]),
    ({"train": {"steps": 2.5}}, ["train.steps=2.5", "integer"]),
    ({"train": {"steps": "many"}}, ["train.steps='many'", "integer"]),
    ({"train": {"steps": True}}, ["train.steps=true", "integer"]),
    ({"train": {"steps": None}}, ["train.steps=null", "integer"]),
    ({"model": {"norm_bias": 1}}, ["model.norm_bias=1", "boolean"]),
    ({"model": {"dropout": 1.0}}, ["model.dropout=1.0", "at least 0 and less than 1"]),
    ({"model": {"norm": "rmsnrom"}}, ["rmsnrom", "rmsnorm, layernorm", "did you mean 'rmsnorm'"]),
    ({"model": {"layer_pattern": ["locl"]}}, ["locl", "did you mean 'local'"]),
    ({"model": {"layer_pattern": []}}, ["model.layer_pattern", "at least 1"]),
    ({"model": {"preset": "lama-tiny"}}, ["model.preset='lama-tiny'", "'llama-tiny'"]),
    ({"model": {"preset": ["gpt2-tiny"]}}, ["model.preset=['gpt2-tiny']"]),
    ({"model": 3}, ["model=3"]),
    ({"optim": None}, ["optim=null"]),
    ({"optim": {"learning_rate": -1.0}}, ["optim.learning_rate=-1.0", "greater than 0"]),
    ({"optim": {"learning_rate": float("nan")}}, ["optim.learning_rate=NaN"]),
    ({"optim": {"learning_rate": float("inf")}}, ["optim.learning_rate=Infinity"]),
    ({"data": {"train": []}}, ["data.train is empty"]),
    ({"data": {"weights": [1.0, -1.0]}}, ["data.weights", "-1.0", "greater than 0"]),
    ({"tokenizer": {"vocab_size": 2}}, ["tokenizer.vocab_size=2", "300"]),
    ({"mesh": "dq4"}, ["mesh='dq4'", "did you mean 'dp'"]),
]


@pytest.mark.parametrize(("sections", "fragments"), WRONG_VALUES, ids=lambda x: str(x)[:50])
def test_wrong_value_is_named(sections, fragments):
    refused(fragments, **sections)


IMPOSSIBLE = [
    ({"model": {"num_heads": 7}}, ["model.d_model=192", "model.num_heads=7"]),
    ({"model": {"num_kv_heads": 3}}, ["num_kv_heads=3", "num_heads=8", "use 2 key/value heads"]),
    ({"model": {"head_dim": 9}}, ["model.head_dim=9 and", "give 9 features to turn", "learned"]),
    ({"model": {"layer_pattern": ["local"]}}, ["model.sliding_window is not set"]),
    ({"model": {"attention": "cudnn", "attention_dropout": 0.1}}, ["cudnn", "attention=auto"]),
    ({"model": {"attention": "xla", "attention_softcap": 5.0}}, ["xla", "attention=auto"]),
    ({"model": {"attention": "stored", "attention_softcap": 5.0}}, ["stored", "attention=auto"]),
    (
        {"model": {"rope_scaling": {"kind": "llama3", "high_freq_factor": 1.0}}},
        ["high_freq_factor=1.0", "low_freq_factor=1.0"],
    ),
    ({"model": {"positions": "relative"}}, ["positions=relative", "model.kind=encoder_decoder"]),
    (
        {"model": {"kind": "encoder_decoder", "positions": "relative", "attention": "blocked"}},
        ["model.attention=blocked", "positions=relative", "attention=auto"],
    ),
    (
        {"model": {"positions": "sinusoidal", "d_model": 193, "head_dim": 8}},
        ["model.d_model=193 is odd", "sinusoidal"],
    ),
    (
        {"model": {"norm_placement": "post_sum", "parallel_residual": True}},
        ["parallel_residual=true", "norm_placement=pre"],
    ),
    ({"model": {"pooling": "mean"}}, ["pooling=mean does not fit model.kind=decoder", "use last"]),
    ({"model": {"kind": "encoder", "pooling": "last"}}, ["kind=encoder", "use mean or first"]),
    ({"model": {"labels": ["good", "good"]}}, ['labels=["good", "good"]', "each label once"]),
    ({"model": {"labels": ["good"]}}, ["two different labels"]),
    ({"data": {"weights": [1.0, 2.0]}}, ["data.weights has 2 numbers for 1 sources"]),
    ({"tokenizer": {"kind": "file"}}, ["tokenizer.kind=file needs tokenizer.path"]),
    (
        {"optim": {"name": "sgd", "nesterov": True}},
        ["optim.nesterov=true needs optim.momentum above 0"],
    ),
    (
        {"train": {"batch_size": 8, "accumulation": 3}},
        ["train.batch_size=8", "train.accumulation=3", "use an accumulation of 2"],
    ),
]


@pytest.mark.parametrize(("sections", "fragments"), IMPOSSIBLE, ids=lambda x: str(x)[:50])
def test_impossible_combination_says_what_would_be_right(sections, fragments):
    refused(fragments, **sections)


LLAMA3 = {"kind": "llama3", "factor": 2.0}
BERT = {"kind": "encoder"}
# A field that would not be read, with what makes it so, and what the sentence asks for.
UNREAD = [
    ("model.norm_bias", True, {}, "model.norm=layernorm"),
    ("model.norm_offset", 1.0, {"norm": "layernorm"}, "model.norm=rmsnorm"),
    ("model.rope_theta", 5.0, {"positions": "learned"}, "model.positions=rotary"),
    ("model.rope_scaling", LLAMA3, {"positions": "none"}, "model.positions=rotary"),
    ("model.rope_local_theta", 5.0, {"positions": "none"}, "model.positions=rotary"),
    ("model.rope_local_theta", 5.0, {}, "a local layer"),
    ("model.sliding_window", 8, {}, "a local layer"),
    (
        "model.rope_theta",
        5.0,
        {"layer_pattern": ["local"], "sliding_window": 8, "rope_local_theta": 9.0},
        "a global layer",
    ),
    ("model.rope_scaling.low_freq_factor", 2.0, {"kind": "linear"}, "kind=llama3"),
    ("model.rope_scaling.high_freq_factor", 9.0, {"kind": "linear"}, "kind=llama3"),
    ("model.rope_scaling.original_max_seq_len", 9, {"kind": "linear"}, "kind=llama3"),
    ("model.position_offset", 2, {}, "model.positions=learned"),
    ("model.relative_buckets", 8, {}, "model.positions=relative"),
    ("model.relative_max_distance", 8, {}, "model.positions=relative"),
    ("model.encoder_layers", 2, {}, "model.kind=encoder_decoder"),
    ("model.layer_pattern", ["local"], BERT | {"sliding_window": 8}, "model.kind=decoder"),
    ("model.experts", {"top_k": 1}, {"kind": "encoder_decoder"}, "model.kind=decoder or encoder"),
    ("model.parallel_residual", True, {"kind": "encoder_decoder"}, "decoder or encoder"),
    ("model.labels", ["a", "b"], {"kind": "encoder_decoder"}, "model.kind=decoder or encoder"),
    ("model.pooling", "mean", {"kind": "encoder_decoder"}, "model.kind=decoder or encoder"),
    ("model.pooler", True, {}, "model.kind=encoder"),
    ("model.token_types", 2, {}, "model.kind=encoder"),
    ("model.tie_embeddings", False, BERT, "a head over the vocabulary"),
    ("model.logits_bias", True, BERT, "a head over the vocabulary"),
    ("model.logit_softcap", 3.0, BERT, "a head over the vocabulary"),
    ("model.scale_logits", True, BERT, "a head over the vocabulary"),
    ("model.scale_logits", True, {"tie_embeddings": False}, "model.tie_embeddings=true"),
    ("data.valid_fraction", 0.1, {"valid": ["x"]}, "an empty data.valid"),
    ("data.text_field", "body", {"valid": ["stdlib"]}, "a source other than stdlib"),
    ("tokenizer.path", "x.model", {"kind": "bpe"}, "tokenizer.kind=file"),
    ("tokenizer.vocab_size", 999, {"kind": "file", "path": "x"}, "tokenizer.kind=bpe or unigram"),
    ("tokenizer.training_mb", 9, {"kind": "file", "path": "x"}, "tokenizer.kind=bpe or unigram"),
    ("train.sample_tokens", 9, {"sample_prompt": ""}, "a train.sample_prompt"),
]


@pytest.mark.parametrize(("key", "value", "others", "needed"), UNREAD, ids=lambda x: str(x)[:50])
def test_a_field_that_nothing_would_read_is_an_error(key, value, others, needed):
    *path, name = key.split(".")
    sections = others | {name: value}
    for section in reversed(path):
        sections = {section: sections}
    refused([f"{key}=", "has no effect without", needed, f"set that, or {key}="], **sections)


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ({"kind": "lstm", "d_ff": 512}, ["model.d_ff=512 is not", "kind=lstm: leave it out, or"]),
        ({"kind": "gru", "num_heads": 4}, ["model.num_heads=4 is not read by model.kind=gru"]),
        ({"kind": "ngram", "dropout": 0.5}, ["dropout=0.5 is not read by model.kind=ngram"]),
        (
            {"kind": "rnn", "preset": "gpt2-tiny"},
            ["of model.preset=gpt2-tiny, is not read", "leave the preset out, or use"],
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_fields_of_other_kinds_are_to_be_left_out(model, fragments):
    refused([*fragments, "model.kind=decoder"], model=model)


def test_recurrent_models_have_nothing_that_adapters_fit():
    fragments = ["lora adapts a Transformer", "init_from='run', model.kind=gru", "leave lora out"]
    refused(fragments, model={"kind": "gru"}, lora={"rank": 4}, init_from="run")


# What each optimiser and schedule reads, besides what all of them do.
READ_BY_ALL = {"name", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm"}
READ_BY_ALL |= {"ema_decay"}
ADAM = {"beta1", "beta2", "eps"}
OPTIMIZERS = {
    "sgd": {"momentum", "nesterov"},
    "adam": ADAM,
    "adamw": ADAM,
    "muon": ADAM,
    "lion": {"beta1", "beta2"},
    "adafactor": set(),
}
SCHEDULES = {
    "constant": set(),
    "inverse_sqrt": set(),
    "linear": {"final_fraction"},
    "cosine": {"final_fraction"},
    "wsd": {"final_fraction", "decay_fraction"},
}


def test_all_optim_fields_are_in_a_table():
    known = READ_BY_ALL.union(*OPTIMIZERS.values(), *SCHEDULES.values())
    assert known == {field.name for field in dataclasses.fields(OptimConfig)}


@pytest.mark.parametrize(("choice", "table"), [("name", OPTIMIZERS), ("schedule", SCHEDULES)])
def test_every_optim_field_is_read_or_refused(choice, table):
    for chosen, reads in table.items():
        for field in set().union(*table.values()):
            given = {choice: chosen, field: 0.5}
            if field == "nesterov":
                given |= {"nesterov": True, "momentum": 0.9}
            if field in reads:
                build_config({"optim": given})
            else:
                refused(["has no effect without optim."], optim=given)
