"""A model in transformers' layout as the GGUF file that llama.cpp runs.

Names and metadata keys come from the `gguf` package. What is here is what it does not know: how
llama.cpp expects the numbers of each family to be arranged, and what it cannot compute.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError, nearest
from jaxlm.export.gguf_families import ALIASES, FAMILIES, METADATA, Layout
from jaxlm.export.gguf_vocabulary import write_vocabulary
from jaxlm.tokenizer import Tokenizer

# Our names of types: `gguf.GGMLQuantizationType`, `gguf.LlamaFileType`.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
BLOCK = 32
# Matrices that llama.cpp wants in float32 whatever the others are.
KEPT = ("position_embd.weight", "ffn_gate_inp.weight")
# What older checkpoints carry along and nothing was learned in.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|attention\.(masked_)?bias)$")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def write_gguf(
    path: Path,
    settings: dict,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    """Write a model as GGUF.

    Args:
        path: the file to write; until it is whole, its tensors are in an unnamed file beside it.
        settings: the model's config.json, of transformers 4 or 5.
        tensors: name and array (float32, float16 or bfloat16) of each tensor of the checkpoint,
            in any order, read once; one at a time is held, of experts one layer.
        tokenizer: whose ids the model takes.
        dtype: one of `DTYPES`, of the matrices; vectors are float32. A matrix whose rows are no
            multiple of 32 cannot be q8_0 and is float16.

    Raises UserError for what llama.cpp cannot express, before the file is begun.
    """
    gguf = import_gguf()
    if dtype not in DTYPES:
        raise UserError(f"GGUF has no type {dtype!r}{nearest(dtype, DTYPES)} ({', '.join(DTYPES)})")
    settings = _canonical(settings)
    layout = FAMILIES[settings["model_type"]]
    _check(settings, layout)
    arch = gguf.MODEL_ARCH[layout.arch]
    names = gguf.get_tensor_name_map(arch, settings["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    quant, file_type = DTYPES[dtype]
    writer.add_name(Path(path).stem)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_settings(writer, settings, layout)
    write_vocabulary(writer, tokenizer, settings["vocab_size"])
    with tempfile.TemporaryFile(dir=Path(path).parent) as spilled:
        writer.temp_file = spilled
        for name, array in _arranged(tensors, settings, layout):
            ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if ours is None:
                raise UserError(f"llama.cpp's {layout.arch} models have no place for {name}")
            kind, data = _quantized(ours, array, quant)
            writer.add_tensor(ours, data, raw_dtype=kind)
        for ours, array in _frequencies(settings, layout):
            writer.add_tensor(ours, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def import_gguf():
    """The `gguf` package. Raises UserError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF export needs the gguf package: pip install 'jaxlm[gguf]'") from error
    return gguf


def _canonical(settings: dict) -> dict:
    """Settings under the names that most families use, with what they imply written out."""
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"llama.cpp export has no table for model_type={model_type!r}"
            f"{nearest(str(model_type), FAMILIES)} (it has {', '.join(FAMILIES)})"
        )
    known = {key: value for key, value in settings.items() if value is not None}
    known |= {ALIASES[key]: value for key, value in known.items() if key in ALIASES}
    heads, width = known["num_attention_heads"], known["hidden_size"]
    implied = {
        "head_dim": width // heads,
        "num_key_value_heads": heads,
        "intermediate_size": 4 * width,
        "tie_word_embeddings": False,
    }
    whole = implied | dict(FAMILIES[model_type].implied) | known
    return whole | _rope(whole)


def _rope(settings: dict) -> dict:
    """Rotary positions of global layers as one dict, and the base of local ones.

    transformers 5 keeps them in `rope_parameters`, by kind of layer where kinds differ;
    transformers 4 beside the other settings, with scaling in `rope_scaling`.
    """
    given = settings.get("rope_parameters", {})
    local = given.get("sliding_attention", {})
    beside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    rope = {key: settings[key] for key in beside if key in settings}
    rope |= settings.get("rope_scaling", {}) | given.get("full_attention", given)
    rope = {"rope_theta": 10_000.0, "rope_type": rope.get("type", "default")} | rope
    theta = settings.get("rope_local_base_freq", rope["rope_theta"])
    kind = local.get("rope_type", "default")
    return {"rope": rope, "local_theta": local.get("rope_theta", theta), "local_type": kind}


def _check(settings: dict, layout: Layout) -> None:
    """Raise UserError for a setting that llama.cpp does not compute."""
    family, head = settings["model_type"], settings["head_dim"]
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    expected = dict(layout.expected)
    if layout.head == "tied":
        expected["tie_word_embeddings"] = True
    if layout.rescaled:
        rescaled = settings["num_hidden_layers"] == layout.rescaled
        expected["query_pre_attn_scalar"] = width // heads if rescaled else head
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise UserError(
                f"llama.cpp computes {family} models with {key}={value!r}, and this one has "
                f"{settings[key]!r}"
            )
    if layout.square and heads * head != width:
        raise UserError(
            f"llama.cpp wants the heads of a {family} model together as wide as the model, but "
            f"{heads} heads of {head} are not {width}"
        )
    if layout.arch == "GEMMA2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not settings.get(key):
                raise UserError(f"llama.cpp computes {family} models with {key}: set it")
    if layout.rope:
        _check_rope(settings, layout)
    _window(settings, layout)


def _check_rope(settings: dict, layout: Layout) -> None:
    rope, family = settings["rope"], settings["model_type"]
    kinds = ("default", "linear", "llama3") if layout.pairs else ("default", "linear")
    if rope["rope_type"] not in kinds:
        raise UserError(
            f"a {family} model's rotary positions scaled by {rope['rope_type']!r} cannot be "
            f"written as GGUF: {' and '.join(kinds[1:])} can"
        )
    if settings["local_type"] != "default":
        raise UserError("llama.cpp does not scale rotary positions in layers with a window")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not layout.partial:
        raise UserError(
            f"llama.cpp turns whole heads of {family} models, but partial_rotary_factor is "
            f"{rope['partial_rotary_factor']}"
        )
    if _turned(settings) % 2:
        raise UserError(
            f"llama.cpp turns an even number of each head's numbers, and here it is "
            f"{_turned(settings)} of {settings['head_dim']}"
        )


def _turned(settings: dict) -> int:
    """How many numbers of each head are rotated."""
    return int(settings["head_dim"] * settings["rope"].get("partial_rotary_factor", 1.0))


def _window(settings: dict, layout: Layout) -> tuple[int, int] | None:
    """The window of local layers, and every how many layers one is global; None without.

    Raises UserError for local layers where llama.cpp knows none, or not these.
    """
    layers, length = settings["num_hidden_layers"], settings["max_position_embeddings"]
    window = settings.get("sliding_window") or length
    period = settings.get("sliding_window_pattern", layout.period)
    kinds = settings.get("layer_types", _kinds(layers, period))
    local = LOCAL in kinds and settings.get("use_sliding_window", True)
    if not layout.period:
        if local and window < length:
            raise UserError(
                f"llama.cpp has no sliding window for {settings['model_type']} models, and here "
                f"it is {window} of {length} positions: set max_position_embeddings to {window} "
                "to export the model for texts that short"
            )
        return None
    if not local:
        # Without a window, llama.cpp gives Gemma 2 the published one.
        return None if layout.arch == "GEMMA3" else (length, layout.period)
    period = kinds.index(GLOBAL) + 1 if GLOBAL in kinds else layers + 1
    if kinds != _kinds(layers, period):
        raise UserError(
            "llama.cpp wants global layers at equal distances, and this model's layer_types are "
            f"{', '.join(kinds)}"
        )
    return window, period


def _kinds(layers: int, period: int) -> list[str]:
    """transformers' names of the layers, if every `period`-th one is global (0: none is)."""
    return [GLOBAL if period and (i + 1) % period == 0 else LOCAL for i in range(layers)]


def _write_settings(writer, settings: dict, layout: Layout) -> None:
    """The metadata from which llama.cpp builds the model."""
    from gguf import RopeScalingType

    for key, method in METADATA.items():
        if key in settings:
            getattr(writer, method)(settings[key])
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    if layout.rope:
        rope = settings["rope"]
        writer.add_rope_dimension_count(_turned(settings))
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    if span := _window(settings, layout):
        # Two keys for which older versions of the package lack a method.
        writer.add_sliding_window(span[0])
        writer.add_uint32(f"{writer.arch}.attention.sliding_window_pattern", span[1])
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", settings["local_theta"])


def _arranged(
    tensors: Iterable[tuple[str, np.ndarray]], settings: dict, layout: Layout
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors as llama.cpp wants them, still by their names in the checkpoint."""
    tied = settings["tie_word_embeddings"]
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors:
        if BUFFERS.search(name) or (tied and name in ("lm_head.weight", "embed_out.weight")):
            continue
        if name.endswith(".bias") and not re.search(layout.biases, name):
            raise UserError(
                f"llama.cpp's {settings['model_type']} models have no bias at {name}: "
                "export the model without it"
            )
        if expert := EXPERT.fullmatch(name):
            stack = f"{expert[1]}.{expert[3]}.weight"
            experts.setdefault(stack, {})[int(expert[2])] = array
            if len(experts[stack]) < settings["num_local_experts"]:
                continue
            name, ordered = stack, sorted(experts.pop(stack).items())
            # The package knows Mixtral's stacks by the names of Mistral's own checkpoints.
            name = re.sub(r"model\.(.+)\.block_sparse_moe", r"\1.feed_forward", name)
            array = np.stack([each for _, each in ordered])
        yield name, _rearranged(name, array, settings, layout)
        if tied and layout.head == "stored" and re.search(r"\.embed_(in|tokens)\.", name):
            yield "lm_head.weight", array
    if experts:
        raise UserError(
            f"the checkpoint lacks some of the {settings['num_local_experts']} experts of "
            f"{min(experts)}"
        )


def _rearranged(name: str, array: np.ndarray, settings: dict, layout: Layout) -> np.ndarray:
    """One tensor's numbers in llama.cpp's order."""
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    if layout.pairs and (part := re.search(r"\.([qk])_proj\.", name)):
        # transformers rotates number i of a head with number i + head_dim / 2.
        halves = array.reshape(heads if part[1] == "q" else kv_heads, 2, -1, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if layout.arch == "GPTNEOX" and ".query_key_value." in name:
        # Each head's query, key and value come one after the other.
        by_head = array.reshape(heads, 3, -1, *array.shape[1:])
        return by_head.swapaxes(0, 1).reshape(array.shape)
    if layout.arch == "GPT2" and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
        return array.T
    if layout.shift and name.endswith("norm.weight"):
        return array.astype(np.float32) + np.float32(layout.shift)
    return array


def _frequencies(settings: dict, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """By how much llama3 scaling divides each frequency, float32 [head_dim / 2].

    Frequencies whose wave is longer than the trained context, by a factor, are divided, short
    ones are not, and those between are in between.
    """
    rope = settings["rope"]
    if not layout.rope or rope["rope_type"] != "llama3":
        return
    turned = _turned(settings)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope.get("original_max_position_embeddings", settings["max_position_embeddings"])
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, turned, 2) / turned)
    smooth = np.clip((trained / waves - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    yield "rope_freqs.weight", divisors.astype(np.float32)


def _quantized(name: str, array: np.ndarray, quant: str) -> tuple[Any, np.ndarray]:
    """The type and bytes of a tensor in the file."""
    from gguf import GGMLQuantizationType, quants

    if array.ndim == 1 or name.endswith(KEPT):
        quant = "F32"
    elif quant == "Q8_0" and array.shape[-1] % BLOCK:
        quant = "F16"
    array = np.ascontiguousarray(array, np.float32)
    if quant == "F16" and not np.abs(array).max(initial=0) <= np.finfo(np.float16).max:
        raise UserError(f"{name} has numbers too large for float16: export it as bfloat16")
    kind = GGMLQuantizationType[quant]
    return kind, quants.quantize(array, kind)
