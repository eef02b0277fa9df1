"""Loaded models of every task, with random parameters: nothing is trained for them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.api import LanguageModel
from jaxlm.chat import with_template
from jaxlm.cli import build_config
from jaxlm.data_config import TokenizerConfig
from jaxlm.decode import build_decode_program
from jaxlm.mesh import make_mesh
from jaxlm.model_config import RECURRENT_READS
from jaxlm.models.build import make_model
from jaxlm.sharding import split_boxes
from jaxlm.tokenizer_training import train_tokenizer

CONTROLS = {
    "translation": (">>de<<", ">>fr<<"),
    "instruction": ("<|im_start|>", "<|im_end|>"),
}
MODELS = {
    "language_modelling": {},
    "instruction": {},
    "translation": {"kind": "encoder_decoder"},
    "classification": {"kind": "encoder", "labels": ("negative", "neutral", "positive")},
}
SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "d_ff": 64}
SIZES |= {"max_seq_len": 64, "init_std": 0.3}


@functools.cache
def tokenizer_of(controls: tuple[str, ...]):
    texts = ["the quick brown fox jumps over the lazy dog, " * 3 + str(i) for i in range(60)]
    return train_tokenizer(iter(texts), TokenizerConfig(vocab_size=300), controls)


@functools.cache
def loaded(
    task: str, mesh: str = "dp1", controls: tuple[str, ...] | None = None, kind: str | None = None
) -> LanguageModel:
    """A model of a task as `jaxlm.load` gives it, a Transformer or of a recurrent `kind`."""
    tokenizer = tokenizer_of(CONTROLS.get(task, ()) if controls is None else controls)
    if task == "instruction":
        tokenizer = with_template(tokenizer)
    fields = SIZES | MODELS[task]
    if kind is not None:
        fields = {name: value for name, value in SIZES.items() if name in RECURRENT_READS}
        fields["kind"] = kind
    fields["vocab_size"] = tokenizer.vocab_size
    config = build_config({"task": task, "model": fields})
    model = make_model(config.model)
    program = build_decode_program(model, make_mesh(mesh))
    params = split_boxes(jax.jit(model.init)(jax.random.key(1)))[0]
    params = program.prepare(jax.tree.map(jnp.asarray, params))
    prefix, suffix = tokenizer.ends if task == "classification" else ([tokenizer.bos_id], [])
    ends = {"prefix": tuple(prefix), "suffix": tuple(suffix)}
    return LanguageModel(config, tokenizer, program, params, source=Path(), **ends)
