"""A model as StableHLO: functions that any runtime of it can call, without jaxlm.

    FOLDER/
        forward.bin         (params, tokens [B, T]) -> logits [B, T, V]
        prefill.bin         (params, tokens [B, T], lengths [B]) -> logits [B, V], cache
        decode.bin          (params, tokens [B], cache) -> logits [B, V], cache
        params.safetensors  the parameters, by their paths
        signature.json      what the functions take and return, and the cache's length

B and T are left open. Each `.bin` is read by `jax.export.deserialize`. In `prefill` rows are padded
in front, `lengths` says how many tokens each has; a cache holds `cache_length` tokens, padding
included.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.export.model import Model
from jaxlm.export.safetensors import write_tensors
from jaxlm.models.decoder import Decoder
from jaxlm.models.stack import unstack
from jaxlm.models.trunk import Cache
from jaxlm.nn.attention import LayerCache, Places
from jaxlm.sharding import as_tree, by_path

PLATFORMS = ("cpu", "cuda")
PARAMS = "params.safetensors"
SIGNATURE = "signature.json"


def write_stablehlo(folder: Path, model: Model, dtype: str) -> None:
    """Write the functions and parameters of a model into an empty folder.

    Parameters are stored as `dtype`; the functions compute in float32. Raises UserError where
    flatbuffers is not installed, and for a model that is no decoder.
    """
    if model.config.kind != "decoder":
        raise UserError(
            "StableHLO export writes model.kind=decoder alone, and this is of kind "
            f"{model.config.kind}: export a decoder"
        )
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("StableHLO export needs flatbuffers: pip install 'jaxlm[stablehlo]'")
    config = dataclasses.replace(
        model.config, dtype="float32", attention="plain", dropout=0.0, attention_dropout=0.0
    )
    decoder = Decoder(config)
    params = by_path(model.params)
    shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
    tensors = ((path, np.asarray(leaf)) for path, leaf in params.items())
    write_tensors(folder, shapes, tensors, np.dtype(jnp.dtype(dtype)), 1 << 62, PARAMS)
    stored = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}
    for name, (function, inputs) in _functions(decoder).items():
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(stored, *inputs)
        (folder / f"{name}.bin").write_bytes(exported.serialize())
    signature = {
        "vocab_size": config.vocab_size,
        "cache_length": config.max_seq_len,
        "bos_id": model.tokenizer.bos_id,
        "eos_id": model.tokenizer.eos_id,
        "platforms": PLATFORMS,
        "params": {path: {"shape": shape, "dtype": dtype} for path, shape in shapes.items()},
        "functions": {
            "forward": "params, tokens [B, T] int32 -> logits [B, T, V] float32",
            "prefill": "params, tokens [B, T] int32, padded in front, lengths [B] int32 -> "
            "logits [B, V] of the last token, cache",
            "decode": "params, tokens [B] int32, cache -> logits [B, V], cache",
        },
        "cache": "list of arrays: positions [B, S] int32, segments [B, S] int32 (0: empty), used "
        "[] int32, then keys and values [B, K, S, H] float32 of each layer",
    }
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=2) + "\n", encoding="utf-8")


def _functions(decoder: Decoder) -> dict:
    """Each function with the shapes of its inputs behind the parameters."""
    length = decoder.config.max_seq_len
    rows, columns = jax.export.symbolic_shape("b, t", constraints=[f"t <= {length}"])
    # A scope of its own: every name of one has to appear in a function's inputs.
    (steps,) = jax.export.symbolic_shape("b")
    i32 = jnp.int32
    cache = jax.eval_shape(lambda: _flat(decoder.init_cache(1, length)))
    cache = [
        jax.ShapeDtypeStruct((steps, *leaf.shape[1:]) if leaf.shape else (), leaf.dtype)
        for leaf in cache
    ]
    tokens = jax.ShapeDtypeStruct((rows, columns), i32)
    lengths, last = (jax.ShapeDtypeStruct((n,), i32) for n in (rows, steps))

    def tree_of(params):
        tree = jax.tree.map(lambda p: p.astype(jnp.float32), as_tree(params))
        return tree | {"layers": unstack(tree["layers"])}

    def forward(params, tokens):
        params = tree_of(params)
        places = Places(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=i32), tokens.shape))
        hidden, *_ = decoder.hidden(params, tokens, places)
        return decoder.logits(params, hidden)

    def step(params, tokens, places, cache):
        hidden, _, cache = decoder.hidden(params, tokens, places, cache=cache)
        return decoder.logits(params, hidden[:, -1:])[:, 0], _flat(cache)

    def prefill(params, tokens, lengths):
        count, width = tokens.shape
        slots = jnp.arange(width, dtype=i32)[None, :] - (width - lengths[:, None])
        places = Places(jnp.maximum(slots, 0), (slots >= 0).astype(i32))
        return step(tree_of(params), tokens, places, decoder.init_cache(count, length))

    def decode(params, tokens, cache):
        cache = _unflat(cache)
        at = cache.used - 1
        last = jax.lax.dynamic_slice_in_dim(cache.places.positions, at, 1, axis=1)
        places = Places(last + 1, jnp.ones_like(last))
        return step(tree_of(params), tokens[:, None], places, cache)

    return {
        "forward": (forward, (tokens,)),
        "prefill": (prefill, (tokens, lengths)),
        "decode": (decode, (last, cache)),
    }


def _flat(cache: Cache) -> list:
    layers = [array for layer in cache.layers for array in (layer.k, layer.v)]
    return [cache.places.positions, cache.places.segments, cache.used, *layers]


def _unflat(arrays: list) -> Cache:
    positions, segments, used, *layers = arrays
    pairs = zip(layers[::2], layers[1::2], strict=True)
    return Cache(tuple(LayerCache(k, v) for k, v in pairs), Places(positions, segments), used)
