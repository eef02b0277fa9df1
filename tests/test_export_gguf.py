"""GGUF files against transformers, run by the real llama.cpp in a process of its own."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.data_config import TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.export import gguf, gguf_vocabulary
from jaxlm.tokenizer import HuggingFaceTokenizer, Tokenizer
from jaxlm.tokenizer_training import train_tokenizer

RUNNER = Path(gguf.__file__).with_name("run_llamacpp.py")
VOCAB_SIZE = 331  # prime, and more than the tokenizers' 320
PROMPT = [1, 5, 300, 17, 17, 2, 8, 250, 99, 31, 4, 60, 61, 62, 63, 200, 7, 330, 11, 13]
NEW_TOKENS = 6
# Largest difference of a log-probability, of which the standard deviation is 0.7. Measured:
# 3e-6, and 2e-3 with gelu, which llama.cpp looks up in a table of float16.
EXACT, GELU = 2e-5, 4e-3

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 5}
SQUARE = {"hidden_size": 60}
MULTI_HEAD = {**SQUARE, "num_key_value_heads": None}
GPT2 = {"num_key_value_heads": None, "intermediate_size": None}
# Families by transformers' class, with what is unusual, and the tolerance.
MODELS = {
    "llama": ("Llama", {"head_dim": 10}, EXACT),
    "llama_biased": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR,
        },
        EXACT,
    ),
    "llama3": ("Llama", {"head_dim": 12, "rope_parameters": LLAMA3}, EXACT),
    "mistral": ("Mistral", {"head_dim": 6, "sliding_window": 64}, EXACT),
    "mixtral": ("Mixtral", EXPERTS, EXACT),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": LINEAR}, EXACT),
    "qwen3": ("Qwen3", {"head_dim": 14}, EXACT),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "moe_intermediate_size": 20, "norm_topk_prob": True, "head_dim": 12},
        EXACT,
    ),
    "gemma": ("Gemma", {"head_dim": 14, "num_key_value_heads": 1}, GELU),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 14,
            "query_pre_attn_scalar": 14,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 3,
        },
        GELU,
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "sliding_window": 6,
            "num_hidden_layers": 4,
            "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
        GELU,
    ),
    "olmo2": ("Olmo2", {**SQUARE, "tie_word_embeddings": True}, EXACT),
    "phi3": (
        "Phi3",
        {
            **SQUARE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.4,
            },
        },
        EXACT,
    ),
    "gpt_neox": (
        "GPTNeoX",
        {
            **MULTI_HEAD,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.6,
            },
        },
        GELU,
    ),
    "gpt_neox_serial": (
        "GPTNeoX",
        {**MULTI_HEAD, "use_parallel_residual": False, "tie_word_embeddings": True},
        GELU,
    ),
    "gpt2": (
        "GPT2",
        {**GPT2, "hidden_size": 35, "num_attention_heads": 5, "n_inner": 50},
        GELU,
    ),
    "gpt2_untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}, GELU),
}
FAST = ("llama3", "gpt2")
FAMILIES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in MODELS
]
TEXTS = [
    "Hello world, it's 12345 things!",
    "  two spaces,   three\n\n\nlines\r\n\tand a\t\ttab ",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # <s> </s> <unk> <0x41>\n",
    "emoji 😀👍🏽 and 你好，世界。 naïve café Ωμέγα\u0301\u3000\0\a",
    "<s>",
    "a",
    "",
]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Code, with words that special tokens could be merged from."""
    return [Path(json.__file__).read_text(), "<s> </s> s> <s <s>cut</s> 你好 " * 50]


@pytest.fixture(scope="module")
def tokenizer(corpus) -> Tokenizer:
    return train_tokenizer(iter(corpus), TokenizerConfig(kind="bpe", vocab_size=320))


def checkpoint(name: str, folder: Path, **changes) -> tuple[torch.nn.Module, dict, dict]:
    """A random model, as transformers saves it: the model, its config.json, its tensors."""
    kind, unusual, _ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL | unusual | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # Norms begin as ones and biases as zeros, which would hide what is done to them.
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    return model, settings, load_file(folder / "model.safetensors")


def run(folder: Path, prompts=(), texts=()) -> dict[str, np.ndarray]:
    """What llama.cpp makes of `folder`/model.gguf."""
    request, out = folder / "request.json", folder / "results.npz"
    fields = {"prompts": list(prompts), "texts": list(texts), "new_tokens": NEW_TOKENS}
    fields |= {"model": str(folder / "model.gguf"), "out": str(out)}
    request.write_text(json.dumps(fields))
    command = [sys.executable, "-P", str(RUNNER), str(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return dict(np.load(out))


def check(model: torch.nn.Module, results: dict[str, np.ndarray], tolerance: float) -> None:
    """Log-probabilities of all tokens after every token fed, and greedy ones."""
    ids = [*PROMPT, *results["greedy_0"]]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits, -1).numpy()
    fed = len(PROMPT)
    np.testing.assert_array_equal(results["positions_0"], np.arange(fed))
    np.testing.assert_allclose(results["logprobs_0"], expected[:fed], rtol=0, atol=tolerance)
    continued = expected[fed - 1 : -1]
    chosen = continued[np.arange(NEW_TOKENS), results["greedy_0"]]
    # The most likely token, or one of two that rounding may swap.
    np.testing.assert_allclose(chosen, continued.max(-1), rtol=0, atol=2 * tolerance)


@needs_llamacpp
@pytest.mark.parametrize("name", FAMILIES)
def test_llamacpp_computes_what_transformers_does(name, tokenizer, tmp_path):
    model, settings, tensors = checkpoint(name, tmp_path)
    gguf.write_gguf(tmp_path / "model.gguf", settings, tensors.items(), tokenizer, "float32")
    results = run(tmp_path, [PROMPT])
    check(model, results, MODELS[name][2])
    assert set(json.loads(str(results["versions"]))) == {"xllamacpp", "llama.cpp"}


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "given", "tolerance", "stored"),
    [
        ("llama", "float16", np.float16, 0.02, "F16 F16 F32"),
        ("qwen3", "bfloat16", ml_dtypes.bfloat16, 0.15, "BF16 BF16 F32"),
        ("mixtral", "q8_0", np.float32, 0.15, "Q8_0 F16 F32"),
    ],
)
def test_types(name, dtype, given, tolerance, stored, tokenizer, tmp_path):
    # Rows of 64 numbers can be q8_0, those of 56 cannot.
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    if name == "mixtral":
        # All experts, lest rounding choose others.
        sizes["num_experts_per_tok"] = EXPERTS["num_local_experts"]
    model, settings, tensors = checkpoint(name, tmp_path, **sizes)
    tensors = ((key, tensor.astype(given)) for key, tensor in tensors.items())
    gguf.write_gguf(tmp_path / "model.gguf", settings, tensors, tokenizer, dtype)
    check(model, run(tmp_path, [PROMPT]), tolerance)
    reader = gguf.import_gguf().GGUFReader(tmp_path / "model.gguf")
    types = {re.sub("_exps", "", each.name): each.tensor_type.name for each in reader.tensors}
    kinds = ("attn_q", "ffn_down", "attn_norm")
    assert " ".join(types[f"blk.1.{kind}.weight"] for kind in kinds) == stored


def byte_level(corpus: list[str], pre_tokenizer=None) -> HuggingFaceTokenizer:
    """A small tokenizer.json in the manner of GPT-2, or with another pre-tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str().encode())


def split(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a tokenizer.json that llama.cpp knows by `name`."""
    patterns, _ = gguf_vocabulary.PRE_TOKENIZERS[name]
    cuts = [pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, bytes_only])


def text_ids(tokenizer: Tokenizer, folder: Path) -> list[list[int]]:
    """Ids of TEXTS by llama.cpp, without the BOS it puts before them."""
    tensors, settings = checkpoint("llama", folder)[2:0:-1]
    gguf.write_gguf(folder / "model.gguf", settings, tensors.items(), tokenizer, "float16")
    results = run(folder, texts=TEXTS)
    ids = [results[f"ids_{i}"].tolist() for i in range(len(TEXTS))]
    assert all(each[0] == tokenizer.bos_id for each in ids)
    return [each[1:] for each in ids]


@needs_llamacpp
@pytest.mark.parametrize("kind", ["bpe", "gpt-2", "qwen2", "smollm", "dbrx"])
def test_llamacpp_tokenizes_as_jaxlm_does(kind, corpus, tokenizer, tmp_path):
    if kind != "bpe":
        tokenizer = byte_level(corpus, None if kind == "gpt-2" else split(kind))
    assert text_ids(tokenizer, tmp_path) == tokenizer.encode_batch(TEXTS)


@needs_llamacpp
def test_llamacpp_finds_as_good_a_segmentation_by_unigrams(corpus, tmp_path):
    tokenizer = train_tokenizer(iter(corpus), TokenizerConfig(kind="unigram", vocab_size=320))
    ids, expected = text_ids(tokenizer, tmp_path), tokenizer.encode_batch(TEXTS)
    # The order of pieces in a run of one character is a matter of taste.
    assert [sorted(each) for each in ids] == [sorted(each) for each in expected]
    assert [tokenizer.decode(each) for each in ids] == TEXTS
    assert ids[0] == expected[0] and ids[3:] == expected[3:]


def test_special_tokens_are_out_of_reach_of_merging():
    assert gguf_vocabulary._out_of_reach("<s>", {"<", "s", ">", "s>"}) == "<|<s>|>"
    assert gguf_vocabulary._out_of_reach("<s>", {"<", "s", ">"}) == "<s>"


def settings_of(name: str) -> dict:
    kind, unusual, _ = MODELS[name]
    return getattr(transformers, f"{kind}Config")(**SMALL | unusual).to_dict()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "lama"}, "did you mean 'llama'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='silu', and this one has 'gelu'"),
        ("llama", {"vocab_size": 300}, "320 tokens, but the model has only 300"),
        ("llama", {"head_dim": 9}, "even number"),
        ("llama", {"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "linear and llama3"),
        ("qwen3", {"rope_parameters": LLAMA3}, "'llama3' cannot be written"),
        ("mistral", {"sliding_window": 32}, "set max_position_embeddings to 32"),
        ("qwen2", {"head_dim": 12}, "6 heads of 12 are not 48"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings=True"),
        ("gemma2", {"attn_logit_softcapping": None}, "set it"),
        ("gemma3", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar=10"),
        (
            "gemma3",
            {"layer_types": [*["full_attention"] * 3, "sliding_attention"]},
            "equal distances",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=True"),
    ],
)
def test_what_llamacpp_cannot_express(name, changes, message, tokenizer, tmp_path):
    with pytest.raises(UserError, match=message):
        gguf.write_gguf(
            tmp_path / "model.gguf", settings_of(name) | changes, [], tokenizer, "float32"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "value", "dtype", "message"),
    [
        ("model.layers.0.self_attn.o_proj.bias", 1.0, "float32", "no bias at"),
        ("model.layers.0.self_attn.r_proj.weight", 1.0, "float32", "no place for"),
        ("lm_head.weight", 1e5, "float16", "export it as bfloat16"),
        ("lm_head.weight", 1.0, "float8", "no type 'float8'"),
    ],
)
def test_tensors_that_do_not_fit(tensor, value, dtype, message, tokenizer, tmp_path):
    array = np.full((3, 3), value, np.float32)
    with pytest.raises(UserError, match=message):
        gguf.write_gguf(
            tmp_path / "model.gguf", settings_of("qwen3"), [(tensor, array)], tokenizer, dtype
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pre_tokenizer", "message"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "add_prefix_space: it has those of"),
        (pre_tokenizers.Sequence([pre_tokenizers.Whitespace()]), "cuts text by Whitespace"),
    ],
)
def test_unknown_pre_tokenizers(pre_tokenizer, message, corpus, tmp_path):
    tokenizer = byte_level(corpus, pre_tokenizer)
    with pytest.raises(UserError, match=message):
        gguf.write_gguf(tmp_path / "model.gguf", settings_of("llama"), [], tokenizer, "float32")


def test_the_package_may_be_missing(monkeypatch, tokenizer, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[gguf\]'"):
        gguf.write_gguf(tmp_path / "m.gguf", settings_of("llama"), [], tokenizer, "float32")
