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
from jaxlm.export import FAMILIES
from jaxlm.export.table import shapes_of
from jaxlm.losses import Objective, blocked_cross_entropy
from jaxlm.model_config import ModelConfig
from jaxlm.models import head
from jaxlm.models.decoder import Decoder
from jaxlm.models.head import head_params
from jaxlm.models.stack import FEW
from jaxlm.nn.attention import Places
from jaxlm.nn.layers import Dropout, residual_std
from jaxlm.sharding import as_tree, split_boxes

pytestmark = pytest.mark.usefixtures("strict")

LLAMA = FAMILIES["llama"]


def reference(**settings):
    """A Llama of transformers with random weights, norms included."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def imported(model, config: ModelConfig):
    """The parameters of transformers' model as the decoder's."""
    tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    shapes = shapes_of(config)
    ours = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for part in LLAMA.to_ours(tensors, config):
        ours[part.path][part.index] = part.view.transpose(np.argsort(part.order))
    return jax.tree.map(jnp.asarray, as_tree(ours))


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
    objective = Objective(decoder.logits, block=5)
    head = head_params(config, params)
    total, sums = blocked_cross_entropy(objective, head, hidden, targets, weights)
    return total / sums.weight, decoder.logits(params, hidden)


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal within a tolerance relative to the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference {worst:.1e}")
    assert worst < tolerance


def test_gradients_are_those_of_autograd():
    model = reference(
        vocab_size=101, hidden_size=36, intermediate_size=52, num_hidden_layers=3, head_dim=10,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    config = LLAMA.config_to_ours(model.config.to_dict())
    params, tokens = imported(model, config), tokens_of(config.vocab_size)
    theirs = model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long())
    theirs.loss.backward()
    (loss, logits), gradients = jax.value_and_grad(loss_and_logits, argnums=1, has_aux=True)(
        config, params, tokens
    )
    assert_close(logits, theirs.logits.detach())
    assert_close(loss, theirs.loss.detach())
    ours = dict(LLAMA.to_theirs(gradients, config))
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
@pytest.mark.slow
def test_stacks_run_alike(stack, remat):
    jax.tree.map(assert_close, outcome(stack, remat), outcome("unroll", "none"))


@pytest.mark.parametrize(
    ("fields", "loops"),
    [
        ({"num_layers": FEW}, 0),
        ({"num_layers": FEW + 1}, 1),
        ({"num_layers": 2, "remat": "full"}, 1),
        ({"num_layers": 2, "stack": "scan"}, 1),
    ],
)
def test_few_layers_are_unrolled(fields, loops):
    config = tiny(attention="plain", **fields)
    params = jax.eval_shape(lambda: initial(config))
    traced = jax.jit(functools.partial(run, config)).lower(params, tokens_of(31, (2, 8)))
    assert traced.as_text().count("stablehlo.while") == loops


def products(remat: str) -> int:
    """How many a training step multiplies: of two like layers one is written down."""
    config = tiny(stack="unroll", remat=remat, attention="plain")
    params, tokens = params_of(config), tokens_of(31, (2, 8))
    loss = lambda params: jnp.square(run(config, params, tokens)).mean()  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params).as_text().count("stablehlo.dot_general")


def test_rematerialising_all_but_projections_multiplies_attention_alone_again():
    once = products("none")
    assert products("dots") == once + 2
    # Queries, keys, values, output, gate and up; what comes last in a layer is not read again.
    assert products("full") == once + 2 + 6


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


def test_a_tied_table_turned_for_the_loss_gives_the_same_numbers(monkeypatch):
    config = tiny(scale_logits=True, logits_bias=True)
    params, tokens = params_of(config), tokens_of(31, (2, 8))
    assert "kernel" in head_params(config, params)["head"]

    def numbers():
        of_params = functools.partial(loss_and_logits.__wrapped__, config)
        return jax.value_and_grad(of_params, has_aux=True)(params, tokens)

    turned = numbers()
    monkeypatch.setattr(head, "is_whole", lambda: False)
    assert "kernel" not in head_params(config, params)["head"]
    jax.tree.map(assert_close, turned, numbers())


def test_a_decoder_needs_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size is not set"):
        Decoder(ModelConfig())
