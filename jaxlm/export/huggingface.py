"""Model folders of Hugging Face transformers: configuration, weights, tokenizer; both ways."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import UserError
from jaxlm.export.families import family_of
from jaxlm.export.model import Model
from jaxlm.export.model_card import model_card
from jaxlm.export.safetensors import read_tensors, write_tensors
from jaxlm.export.table import Family
from jaxlm.export.vocabulary import write_tokenizer
from jaxlm.model_config import ModelConfig
from jaxlm.sharding import as_tree, by_path
from jaxlm.tokenizer import Tokenizer, load_tokenizer

SETTINGS = "config.json"
RUN_CONFIG = "config.yaml"
# As `jaxlm.translate` searches.
SEARCH = {"num_beams": 4, "length_penalty": 0.6, "early_stopping": False}


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder of a model from transformers rather than a run."""
    return (path / SETTINGS).is_file() and not (path / RUN_CONFIG).exists()


def read_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises UserError where there is none that can be read."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {SETTINGS}: give a folder of a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / SETTINGS} cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{folder / SETTINGS} should hold a JSON object")
    if settings.get("quantization_config"):
        raise UserError(
            f"{folder} is quantised (quantization_config in its {SETTINGS}): use the checkpoint it "
            "was made from"
        )
    return settings


def read_model_config(folder: Path) -> ModelConfig:
    """What the model of a folder is. Raises UserError for one that the decoder cannot compute."""
    settings = read_settings(folder)
    family = family_of(settings)
    names = tuple(read_tensors(folder)) if family.optional else ()
    for ending, key in family.optional.items():
        settings[key] = any(name.endswith(ending) for name in names)
    return family.config_to_ours(settings)


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """A folder's tokenizer. Raises UserError for one with more ids than the model has."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, but its model's "
            f"vocabulary only {config.vocab_size}: they do not belong together"
        )
    return tokenizer


def read_params(folder: Path, config: ModelConfig, targets):
    """The parameters in a folder, as arrays on the devices.

    `targets` is a tree of ShapeDtypeStruct, in logical shapes and with shardings: the parameters'
    types and places; what it does not name is left out. Weights are read from the disk one tensor
    at a time, each device's part of it alone, and turned and cast there. Raises UserError for a
    folder that does not hold them.
    """
    family = family_of(read_settings(folder))
    targets = by_path(targets)
    done: dict[str, jax.Array] = {}
    for part in family.to_ours(read_tensors(folder), config):
        if part.path not in targets:
            continue
        target = targets[part.path]
        values = _on_devices(part, target)
        if not part.index:
            done[part.path] = values
            continue
        if part.path not in done:
            done[part.path] = _zeros(target)
        where = tuple(np.int32(i) for i in part.index)
        done[part.path] = _writer(target.sharding)(done[part.path], values, where)
        # Otherwise the host would read on while the devices are behind, and hold it all.
        jax.block_until_ready(done[part.path])
    return as_tree(done)


def _on_devices(part, target) -> jax.Array:
    """A part of a parameter, in our order and type, laid out as the parameter will be."""
    spec = tuple(target.sharding.spec) + (None,) * len(target.shape)
    spec = spec[len(part.index) : len(target.shape)]
    ours, theirs = (
        NamedSharding(target.sharding.mesh, PartitionSpec(*s))
        for s in (spec, [spec[i] for i in part.order])
    )
    values = jax.make_array_from_callback(
        part.view.shape, theirs, lambda where: np.ascontiguousarray(part.view[where])
    )
    return _turner(part.order, target.dtype, ours)(values)


def _zeros(target) -> jax.Array:
    make = functools.partial(jnp.zeros, target.shape, target.dtype)
    return jax.jit(make, out_shardings=target.sharding)()


@functools.cache
def _turner(order: tuple[int, ...], dtype, sharding):
    turn = lambda x: x.transpose(np.argsort(order)).astype(dtype)  # noqa: E731
    return jax.jit(turn, out_shardings=sharding)


@functools.cache
def _writer(sharding):
    """(whole, values, index) -> whole, `values` written to it.

    Not compiled together with `_turner`: on a CPU, turning what is written takes five times as
    long, and `.at[].set` of bfloat16 as long again.
    """

    def write(whole, values, index):
        values = jnp.expand_dims(values, tuple(range(len(index))))
        return jax.lax.dynamic_update_slice(
            whole, values, (*index, *(0,) * (whole.ndim - len(index)))
        )

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def write_model(folder: Path, family: Family, model: Model, dtype: str, file_bytes: int) -> None:
    """Write a model as transformers would save it, with its tokenizer, into an empty folder.

    `dtype` is "float32", "bfloat16" or "float16". Raises UserError for a model that the family
    cannot express.
    """
    settings = family.config_to_theirs(model.config)
    ids = _token_ids(model, settings)
    settings |= ids | {"dtype": dtype, "torch_dtype": dtype}
    if model.use in ("language_model", "translator"):
        settings["use_cache"] = True
        _write_json(folder / "generation_config.json", _generation(model, ids))
    _write_json(folder / SETTINGS, settings)
    ends = [model.tokenizer.bos_id], []
    if model.use != "language_model":
        ends = model.prefix, model.suffix
    longest = model.config.max_seq_len
    write_tokenizer(model.tokenizer, folder, longest, ends, ids.get("pad_token_id"))
    card = model_card(model, family.architecture, dtype)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_tensors(
        folder,
        family.shapes(model.config),
        family.to_theirs(model.params, model.config),
        np.dtype(jnp.dtype(dtype)),
        file_bytes,
    )


def _token_ids(model: Model, settings: Mapping[str, Any]) -> dict[str, int | None]:
    """The ids that both configurations name."""
    tokenizer = model.tokenizer
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if model.use == "language_model":
        return ids
    ids["pad_token_id"] = settings.get("pad_token_id", tokenizer.pad_id)
    if model.use == "translator":
        # Where Marian is not told, it ends texts with an id of its own.
        ids |= {"decoder_start_token_id": tokenizer.bos_id, "forced_eos_token_id": None}
    return ids


def _generation(model: Model, ids: Mapping[str, Any]) -> dict[str, Any]:
    """How transformers generates where it is not told otherwise."""
    if model.use == "language_model":
        return ids | {"_from_model_config": True}
    return ids | SEARCH | {"max_length": model.config.max_seq_len}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
