"""A model in transformers' layout as the GGUF file that llama.cpp runs.

Names and metadata keys come from the `gguf` package. What is here is what it does not know: how
llama.cpp expects the numbers of each family to be arranged, and what it cannot compute.
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError, nearest
from jaxlm.export.gguf_vocabulary import write_vocabulary
from jaxlm.tokenizer import Tokenizer

# Our names of types: `gguf.GGMLQuantizationType`, `gguf.LlamaFileType`.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
QUANTUM = 32
# Matrices that llama.cpp wants in float32 whatever the others are.
KEPT = ("position_embd.weight", "ffn_gate_inp.weight")
# What older checkpoints carry along and nothing was learned in.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|attention\.(masked_)?bias)$")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
# GPT-2's names of settings.
ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "rms_norm_eps": "norm_eps",
    "hidden_activation": "hidden_act",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "num_experts": "num_local_experts",
}
_QKV_BIAS = r"\.self_attn\.[qkv]_proj\.bias$"
_ANY_BIAS = r"\.bias$"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How llama.cpp holds one family, and how far it goes."""

    arch: str
    """The member of `gguf.MODEL_ARCH`."""
    activation: str = "silu"
    biases: str = r"(?!)"
    """A pattern of the biases that llama.cpp adds."""
    norm: str = "rms"
    rope: bool = True
    pairs: bool = False
    """Rotates neighbours, not halves: rows of q and k are interleaved. Takes llama3 scaling."""
    partial: bool = False
    """May rotate a part of each head."""
    square: bool = False
    """Heads together are as wide as the model."""
    ties: bool | None = None
    """Whether the head must be the embedding (True), or must be stored even if it is (False)."""
    shift: float = 0.0
    """What transformers adds to norm weights and llama.cpp does not."""
    period: int = 0
    """Every so many layers one attends to all positions, the others to a window."""
    scaled: int = 0
    """Layers of the published model whose attention scale differs, by which llama.cpp knows it."""
    expected: tuple[tuple[str, Any], ...] = ()
    """Settings that llama.cpp takes for granted, and what a config.json without them means."""


LLAMA = Layout("LLAMA", pairs=True, biases=_ANY_BIAS)
GEMMA = Layout("GEMMA", activation="gelu_pytorch_tanh", ties=True, shift=1.0)
FAMILIES = {
    "gpt2": Layout(
        *("GPT2", "gelu_new", _ANY_BIAS, "layer"),
        rope=False,
        square=True,
        expected=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Layout("QWEN2", biases=_QKV_BIAS, square=True),
    "qwen3": Layout("QWEN3"),
    "qwen3_moe": Layout(
        "QWEN3MOE",
        expected=(("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "gemma": GEMMA,
    "gemma2": dataclasses.replace(GEMMA, arch="GEMMA2", period=2, scaled=46),
    "gemma3_text": dataclasses.replace(GEMMA, arch="GEMMA3", ties=None, period=6, scaled=62),
    "olmo2": Layout("OLMO2", square=True, ties=False),
    "phi3": Layout("PHI3", partial=True, square=True),
    "gpt_neox": Layout(
        *("GPTNEOX", "gelu", _ANY_BIAS, "layer"),
        partial=True,
        square=True,
        ties=False,
        expected=(("attention_bias", True),),
    ),
}


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
        "tie_word_embeddings": FAMILIES[model_type].ties is True or model_type == "gpt2",
    }
    return implied | known | _rope(known)


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
    theta = local.get("rope_theta", settings.get("rope_local_base_freq", 10_000.0))
    defaults = {"rope_theta": 10_000.0, "rope_type": rope.get("type", "default")}
    return {"rope": defaults | rope, "local_theta": theta}


def _check(settings: dict, layout: Layout) -> None:
    """Raise UserError for a setting that llama.cpp does not compute."""
    family, head = settings["model_type"], settings["head_dim"]
    expected = dict(layout.expected) | {"hidden_act": layout.activation}
    if layout.period:
        layers, width = settings["num_hidden_layers"], settings["hidden_size"]
        scale = width // settings["num_attention_heads"] if layers == layout.scaled else head
        expected["query_pre_attn_scalar"] = scale
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise UserError(
                f"llama.cpp computes {family} models with {key}={value!r} only, "
                f"and this one has {settings[key]!r}"
            )
    if layout.square and settings["num_attention_heads"] * head != settings["hidden_size"]:
        raise UserError(
            f"llama.cpp wants the heads of a {family} model as wide together as the model, but "
            f"{settings['num_attention_heads']} heads of {head} are not {settings['hidden_size']}"
        )
    if layout.ties and not settings["tie_word_embeddings"]:
        raise UserError(
            f"llama.cpp has no separate head for {family} models: tie_word_embeddings must be true"
        )
    if layout.arch == "GEMMA2" and not (
        settings.get("attn_logit_softcapping") and settings.get("final_logit_softcapping")
    ):
        raise UserError("llama.cpp computes gemma2 models with both soft caps only: set them")
    if layout.arch == "GEMMA3" and settings.get("attn_logit_softcapping"):
        raise UserError("llama.cpp does not cap the attention scores of gemma3_text models")
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
    window = settings.get("sliding_window")
    period = settings.get("sliding_window_pattern", layout.period)
    kinds = settings.get("layer_types", _kinds(layers, period))
    if "sliding_attention" not in kinds or not settings.get("use_sliding_window", True):
        window = None
    if not layout.period:
        if window and window < length:
            raise UserError(
                f"llama.cpp has no sliding window for {settings['model_type']} models, and here "
                f"it is {window} of {length} positions: set max_position_embeddings to {window} "
                "to export the model for texts that short"
            )
        return None
    if window is None:
        return length, 1
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else layers + 1
    if any(
        (kind == "full_attention") != (i % period == period - 1) for i, kind in enumerate(kinds)
    ):
        raise UserError(
            "llama.cpp wants a global layer at equal distances, and this model's layer_types are "
            f"{', '.join(kinds)}"
        )
    return window, period


def _kinds(layers: int, period: int) -> list[str]:
    """transformers' names of the layers, if every `period`-th one is global (0: none is)."""
    last = period - 1
    kinds = ("sliding_attention", "full_attention")
    return [kinds[bool(period) and i % period == last] for i in range(layers)]


def _write_settings(writer, settings: dict, layout: Layout) -> None:
    """The metadata from which llama.cpp builds the model."""
    from gguf import RopeScalingType

    head, rope = settings["head_dim"], settings["rope"]
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    if layout.norm == "rms":
        writer.add_layer_norm_rms_eps(settings["norm_eps"])
    else:
        writer.add_layer_norm_eps(settings["norm_eps"])
    if layout.rope:
        writer.add_rope_dimension_count(_turned(settings))
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    if layout.arch == "GPTNEOX":
        writer.add_parallel_residual(settings.get("use_parallel_residual", True))
    if experts := settings.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(settings["num_experts_per_tok"])
        if "moe_intermediate_size" in settings:
            writer.add_expert_feed_forward_length(settings["moe_intermediate_size"])
    if cap := settings.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := settings.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    if span := _window(settings, layout):
        writer.add_sliding_window(span[0])
        writer.add_sliding_window_pattern(span[1])
    if layout.arch == "GEMMA3":
        writer.add_rope_freq_base_swa(settings["local_theta"])


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
        if tied and layout.ties is False and re.search(r"\.embed_(in|tokens)\.", name):
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
    elif quant == "Q8_0" and array.shape[-1] % QUANTUM:
        quant = "F16"
    array = np.ascontiguousarray(array, np.float32)
    if quant == "F16" and not np.abs(array).max(initial=0) <= np.finfo(np.float16).max:
        raise UserError(f"{name} has numbers too large for float16: export it as bfloat16")
    kind = GGMLQuantizationType[quant]
    return kind, quants.quantize(array, kind)
