"""The decoder against transformers' models, and against itself run in other ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm.errors import UserError
from jaxlm.export import FAMILIES, Family
from jaxlm.export.llama import BODY, LLAMA
from jaxlm.export.table import Tensor
from jaxlm.losses import blocked_cross_entropy
from jaxlm.model_config import ModelConfig, RopeScaling
from jaxlm.models.decoder import Decoder
from jaxlm.nn.attention import Places
from jaxlm.nn.layers import Dropout, residual_std
from jaxlm.sharding import split_boxes

pytestmark = pytest.mark.usefixtures("quick_compile", "strict")

LAYER = "model.layers.{}."
# transformers' sizes: an odd vocabulary, 3 query heads to a key head, heads wider than D / N.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
# The same, as jaxlm names them.
OURS = {
    "vocab_size": 101,
    "d_model": 36,
    "d_ff": 52,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "max_seq_len": 64,
    "norm_eps": 1e-6,
}
QK_NORM = (
    Tensor(LAYER + "self_attn.q_norm.weight", "layers/attention/q_norm/scale", "h"),
    Tensor(LAYER + "self_attn.k_norm.weight", "layers/attention/k_norm/scale", "h"),
)
POST_NORMS = (
    Tensor(LAYER + "post_attention_layernorm.weight", "layers/attention_post_norm/scale", "d"),
    Tensor(LAYER + "pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "d"),
    Tensor(LAYER + "post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "d"),
)
QWEN3 = dataclasses.replace(LLAMA, tensors=(*LLAMA.tensors, *QK_NORM))
GEMMA2 = dataclasses.replace(LLAMA, tensors=(*BODY, *POST_NORMS))
GEMMA3 = dataclasses.replace(LLAMA, tensors=(*BODY, *POST_NORMS, *QK_NORM))
GEMMA = {
    "mlp": "geglu",
    "norm_offset": 1.0,
    "scale_embeddings": True,
    "tie_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers and the fields that should make the decoder compute the same."""

    name: str
    kind: str
    settings: dict
    fields: dict
    table: Family = LLAMA


CASES = [
    Case("mistral", "Mistral", {"sliding_window": 5}, {
        "sliding_window": 5, "layer_pattern": ("local",), "tie_embeddings": False,
    }),
    Case("qwen2", "Qwen2", {"head_dim": 6}, {
        "head_dim": None, "qkv_bias": True, "tie_embeddings": False,
    }),
    Case("qwen2-window", "Qwen2", {
        "head_dim": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }, {
        "head_dim": None, "qkv_bias": True, "tie_embeddings": False,
        "sliding_window": 4, "layer_pattern": ("global", "local", "local"),
    }),
    Case("qwen3", "Qwen3", {"tie_word_embeddings": True}, {"qk_norm": True}, QWEN3),
    Case("gemma", "Gemma", {}, GEMMA),
    Case("gemma2", "Gemma2", {
        "num_hidden_layers": 5, "sliding_window": 4, "query_pre_attn_scalar": 7,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
    }, GEMMA | {
        "num_layers": 5, "sliding_window": 4, "layer_pattern": ("local", "global"),
        "attention_scale": 7**-0.5, "attention_softcap": 2.0, "logit_softcap": 3.0,
        "norm_placement": "pre_post",
    }, GEMMA2),
    Case("gemma3", "Gemma3", {
        "num_hidden_layers": 7, "sliding_window": 4, "query_pre_attn_scalar": 10,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
        },
    }, GEMMA | {
        "num_layers": 7, "sliding_window": 4, "layer_pattern": ("local",) * 5 + ("global",),
        "qk_norm": True, "rope_theta": 300.0, "rope_local_theta": 40.0,
        "rope_scaling": RopeScaling(kind="linear", factor=8.0), "norm_placement": "pre_post",
    }, GEMMA3),
]  # fmt: skip


def reference(kind: str, **settings):
    """A model of transformers with random weights, norms and biases included."""
    torch.manual_seed(0)
    config = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))
    model = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))
    model = model(config(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            assert parameter.std() > 0, name
    return model


def imported(family: Family, model, config: ModelConfig):
    """The parameters of transformers' model as the decoder's."""
    tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    return jax.tree.map(jnp.asarray, family.to_ours(tensors, config))


def tokens_of(vocab_size: int, shape=(2, 23), seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)


def whole(shape):
    """Places of rows that hold one document each."""
    return Places(jnp.broadcast_to(jnp.arange(shape[1]), shape))


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params, tokens, places=None, dropout=None):
    """Logits of every position."""
    decoder = Decoder(config)
    hidden, *_ = decoder.hidden(params, tokens, places or whole(tokens.shape), dropout)
    return decoder.logits(params, hidden)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_logits(config: ModelConfig, params, tokens):
    """The mean cross-entropy that transformers' `labels` asks for, and all logits."""
    decoder = Decoder(config)
    hidden, *_ = decoder.hidden(params, tokens, whole(tokens.shape))
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0.0)
    sums = blocked_cross_entropy(
        hidden, lambda x: decoder.logits(params, x), targets, weights, block=5
    )
    return sums.nats / sums.weight, decoder.logits(params, hidden)


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal within a tolerance relative to the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference {worst:.1e}")
    assert worst < tolerance


def assert_same_model(family: Family, model, config: ModelConfig):
    params = imported(family, model, config)
    tokens = tokens_of(config.vocab_size)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long())
    loss, logits = loss_and_logits(config, params, tokens)
    assert_close(logits, theirs.logits)
    assert_close(loss, theirs.loss)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}},
    ],
    ids=["tied", "untied-llama3-biases", "linear"],
)
def test_llama_computes_what_transformers_does(settings):
    model = reference("Llama", **SIZES, **settings)
    config = FAMILIES["llama"].config_to_ours(model.config.to_dict())
    assert_same_model(FAMILIES["llama"], model, config)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_computes_what_transformers_does(tied):
    model = reference(
        "GPT2", vocab_size=97, n_positions=31, n_embd=30, n_layer=2, n_head=3, n_inner=44,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    config = FAMILIES["gpt2"].config_to_ours(model.config.to_dict())
    assert_same_model(FAMILIES["gpt2"], model, config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_decoder_computes_the_other_families(case: Case):
    model = reference(case.kind, **SIZES | case.settings)
    assert_same_model(case.table, model, ModelConfig(**OURS | case.fields))


def test_gradients_are_those_of_autograd():
    model = reference("Llama", **SIZES)
    config = LLAMA.config_to_ours(model.config.to_dict())
    params, tokens = imported(LLAMA, model, config), tokens_of(config.vocab_size)
    model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    gradients, _ = jax.grad(loss_and_logits, argnums=1, has_aux=True)(config, params, tokens)
    ours = LLAMA.to_theirs(gradients, config)
    for name, parameter in model.named_parameters():
        assert_close(ours[name], parameter.grad, 3e-5)


def tiny(**fields) -> ModelConfig:
    defaults = {"vocab_size": 31, "d_model": 16, "num_layers": 2, "num_heads": 4, "d_ff": 24}
    return ModelConfig(**defaults | {"num_kv_heads": 2, "init_std": 0.2} | fields)


def params_of(config: ModelConfig):
    """Any parameters, quickly."""
    draw = np.random.default_rng(0).normal
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    return jax.tree.map(
        lambda p: jnp.asarray(draw(0, 0.3, p.shape), p.dtype), split_boxes(boxed)[0]
    )


@functools.cache
def initial(config: ModelConfig):
    """The parameters a run starts from."""
    return jax.jit(lambda key: split_boxes(Decoder(config).init(key))[0])(jax.random.key(0))


@functools.cache
def outcome(stack: str, remat: str):
    """Gradients and logits of three layers of two kinds, dropout included."""
    config = tiny(num_layers=3, layer_pattern=("local", "global"), sliding_window=3, dropout=0.2)
    params, tokens = params_of(config), tokens_of(31, (2, 8))
    config = dataclasses.replace(config, stack=stack, remat=remat)
    drop = Dropout(jax.random.key(3, impl="unsafe_rbg"), jnp.arange(16).reshape(2, 8))

    def loss(params):
        logits = run(config, params, tokens, dropout=drop)
        return jnp.square(logits).mean(), logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    ("stack", "remat"),
    [("scan", "none"), ("scan", "full"), ("unroll", "dots")],
)
def test_stacks_run_alike(stack, remat):
    jax.tree.map(assert_close, outcome(stack, remat), outcome("unroll", "none"))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_packed_document_reads_like_the_document_alone(positions):
    config = tiny(positions=positions, layer_pattern=("local", "global"), sliding_window=3)
    params = params_of(config)
    first, second = tokens_of(31, (1, 6)), tokens_of(31, (1, 5), seed=1)
    packed = np.concatenate([first, second, np.zeros((1, 2), np.int32)], 1)
    places = Places(
        jnp.array([[*range(6), *range(5), 0, 1]]), jnp.array([[1] * 6 + [2] * 5 + [0] * 2])
    )
    logits = run(config, params, packed, places)
    assert_close(logits[:, :6], run(config, params, first))
    assert_close(logits[:, 6:11], run(config, params, second))


def test_bfloat16_stays_close_and_gives_float32_logits():
    config = tiny()
    params, tokens = params_of(config), tokens_of(31, (2, 9))
    exact = run(config, params, tokens)
    rough = run(dataclasses.replace(config, dtype="bfloat16"), params, tokens)
    assert rough.dtype == jnp.float32
    assert_close(rough, exact, 0.05)
    assert np.abs(rough - exact).max() > 0


WIDE = {"d_model": 64, "d_ff": 96, "init_mean": 0.5, "init_std": 0.1, "tie_embeddings": False}
WIDE |= {"qkv_bias": True, "norm_offset": 1.0}


def test_initial_matrices_have_the_mean_and_deviation_asked_for():
    params = initial(tiny(**WIDE))
    layers, residual = params["layers"], 0.1 / (2 * 2) ** 0.5
    for matrix, deviation in (
        (params["embed"]["embedding"], 0.1),
        (params["head"]["kernel"], 0.1),
        (layers["attention"]["q"]["kernel"], 0.1),
        (layers["mlp"]["up"]["kernel"], 0.1),
        (layers["attention"]["out"]["kernel"], residual),
        (layers["mlp"]["down"]["kernel"], residual),
    ):
        assert matrix.dtype == jnp.float32
        assert abs(matrix.mean() - 0.5) < 5 * deviation / matrix.size**0.5
        assert abs(matrix.std() / deviation - 1) < 5 / matrix.size**0.5
    assert residual_std(tiny(init_std=0.1, scale_residual_init=False)) == 0.1


def test_norms_and_biases_start_as_the_identity():
    layers = initial(tiny(**WIDE))["layers"]
    assert not np.any(layers["attention_norm"]["scale"])
    assert not np.any(layers["attention"]["q"]["bias"])


def test_a_layer_starts_the_same_however_many_there_are():
    few, many = (initial(tiny(num_layers=n, **WIDE))["layers"] for n in (2, 3))
    for name in ("q", "k", "v"):
        kernels = few["attention"][name]["kernel"], many["attention"][name]["kernel"]
        np.testing.assert_array_equal(kernels[0], kernels[1][:2])
        assert not np.array_equal(kernels[1][0], kernels[1][1])


def test_only_an_untied_model_has_a_head():
    assert "head" not in params_of(tiny())
    assert params_of(tiny(tie_embeddings=False))["head"]["kernel"].shape == (16, 31)


def test_a_decoder_needs_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size is not set"):
        Decoder(ModelConfig())
