"""Mixtures of experts against a loop over tokens, PyTorch's blocks, and what routing promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from jaxlm.mesh import make_mesh
from jaxlm.model_config import ExpertsConfig, ModelConfig
from jaxlm.nn.moe import Experts, auxiliary_loss, balance, metrics, route, top_k
from jaxlm.sharding import replicated_sharding, split_boxes
from jaxlm.step import on_mesh

pytestmark = pytest.mark.usefixtures("strict")

BATCH, LENGTH, WIDTH, FF = 4, 7, 8, 6


def tiny(**experts) -> ModelConfig:
    mlp = experts.pop("mlp", "swiglu")
    fields = {"num_experts": 6, "top_k": 2, "d_ff": FF} | experts
    return ModelConfig(
        vocab_size=11, d_model=WIDTH, num_heads=2, num_kv_heads=2, d_ff=10, mlp=mlp,
        experts=ExpertsConfig(**fields),
    )  # fmt: skip


def params_of(config: ModelConfig):
    """Any parameters, the bias included."""
    rng = np.random.default_rng(0)
    x, is_token = jnp.zeros((1, 1, WIDTH)), jnp.ones((1, 1), bool)
    module = Experts(config, jnp.dtype("float32"))
    boxed = jax.eval_shape(module.init, jax.random.key(0), x, is_token)["params"]
    draw = lambda s: jnp.asarray(rng.normal(0, 0.6, s.shape), s.dtype)  # noqa: E731
    return jax.tree.map(draw, split_boxes(boxed)[0])


def some_x(seed=1):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")


ALL = np.ones((BATCH, LENGTH), bool)


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params, x, is_token):
    return Experts(config, jnp.dtype("float32")).apply({"params": params}, x, is_token)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_a_loop(config: ModelConfig, params, x):
    """The layer [B, T, D] for one token after the other, in float64 by NumPy."""
    e = config.experts
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros(x.shape)

    def feed_forward(x, weights):
        hidden = x @ weights["up"]
        if config.mlp == "gelu":
            return gelu(hidden) @ weights["down"]
        return (silu(x @ weights["gate"]) * hidden) @ weights["down"]

    for b, t in np.ndindex(x.shape[:2]):
        token = x[b, t].astype(np.float64)
        logits = token @ p["router"]["kernel"]
        scores = np.exp(logits) / np.exp(logits).sum()
        if e.score == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + p.get("balance_bias", 0.0)))[: e.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if e.normalize else 1.0) * e.scale
        for expert, weight in zip(chosen, weights, strict=True):
            own = {name: p[name]["kernel"][expert] for name in ("up", "gate", "down") if name in p}
            out[b, t] += weight * feed_forward(token, own)
        if e.d_shared:
            shared = {name: leaf["kernel"] for name, leaf in p["shared"].items()}
            out[b, t] += feed_forward(token, shared)
    return out


VARIANTS = {
    "mixtral": {},
    "qwen3": {"normalize": False, "top_k": 3},
    "deepseek": {"score": "sigmoid", "scale": 2.5, "bias_rate": 0.1, "d_shared": 5},
    "biased": {"bias_rate": 0.1, "normalize": False},
    "plain": {"mlp": "gelu", "top_k": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_over_tokens_computes_the_same(variant):
    config = tiny(**VARIANTS[variant])
    params, x = params_of(config), some_x()
    got, _ = run(config, params, x, ALL)
    wanted = by_a_loop(config, params, x)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def dense(config: ModelConfig, params, x):
    """The layer with every expert on every token: slow, and differentiable."""
    e = config.experts
    logits = jnp.einsum("btd,de->bte", x, params["router"]["kernel"])
    scores = jax.nn.sigmoid(logits) if e.score == "sigmoid" else jax.nn.softmax(logits)
    bias = params.get("balance_bias", jnp.zeros(e.num_experts))
    _, chosen = jax.lax.top_k(scores + bias[None, None], e.top_k)
    weights = scores * jax.nn.one_hot(chosen, e.num_experts).sum(2)
    if e.normalize:
        weights = weights / weights.sum(-1, keepdims=True)

    def feed_forward(x, p):
        up, gate, down = (p[name]["kernel"] for name in ("up", "gate", "down"))
        lead = "e" if up.ndim == 3 else ""
        hidden = jax.nn.silu(jnp.einsum(f"btd,{lead}df->bt{lead}f", x, gate))
        hidden = hidden * jnp.einsum(f"btd,{lead}df->bt{lead}f", x, up)
        return jnp.einsum(f"bt{lead}f,{lead}fd->bt{lead}d", hidden, down)

    out = jnp.einsum("bted,bte->btd", feed_forward(x, params), weights) * e.scale
    return out + feed_forward(x, params["shared"]) if e.d_shared else out


def weighed(out):
    weights = np.random.default_rng(5).normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
    return jnp.sum(jnp.sin(out) * weights)


@functools.cache
def gradients(variant: str, mesh: str | None, **fields):
    """Of (parameters, x), through the layer alone."""
    config = tiny(**VARIANTS[variant] | fields)
    arguments = params_of(config), jnp.asarray(some_x()), jnp.asarray(ALL)

    def loss(params, x, is_token):
        out, sums = Experts(config, jnp.dtype("float32")).apply({"params": params}, x, is_token)
        return weighed(out), (out, sums)

    function = jax.value_and_grad(loss, (0, 1), has_aux=True)
    if mesh is not None:
        mesh = make_mesh(mesh)
        arguments = jax.device_put(arguments, replicated_sharding(mesh))
        function = on_mesh(function, mesh)
    (_, aux), got = jax.jit(function)(*arguments)
    return jax.device_get((got, aux))


def assert_same(got, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3", "deepseek"])
def test_gradients_are_those_of_every_expert_on_every_token(variant):
    config = tiny(**VARIANTS[variant])
    loss = lambda params, x: weighed(dense(config, params, x))  # noqa: E731
    wanted = jax.jit(jax.grad(loss, (0, 1)))(params_of(config), jnp.asarray(some_x()))
    got, _ = gradients(variant, None)
    assert_same(got, wanted)
    assert np.any(got[0]["router"]["kernel"])
    assert not np.any(got[0].get("balance_bias", 0.0))


@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        ("ep2,tp2,dp2", {}),
        pytest.param("ep2", {}, marks=pytest.mark.slow),
        pytest.param("ep2,fsdp2", {"capacity": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_computes_the_same(mesh, fields):
    wanted = gradients("deepseek", None, **fields)
    assert_same(gradients("deepseek", mesh, **fields), wanted)
    assert (wanted[1][1]["dropped"] > 0) == bool(fields)


def reference_block(kind: str):
    """PyTorch's block with random weights."""
    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": 2, "num_attention_heads": 2}
    if kind == "mixtral":
        config = MixtralConfig(intermediate_size=FF, num_local_experts=6, **sizes)
    else:
        more = {"num_experts": 6, "norm_topk_prob": kind == "qwen3-normalised"}
        config = Qwen3MoeConfig(moe_intermediate_size=FF, **more, **sizes)
    config._experts_implementation = "eager"
    block = (MixtralSparseMoeBlock if kind == "mixtral" else Qwen3MoeSparseMoeBlock)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.6)
    return block.eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "qwen3-normalised"])
def test_transformers_block_computes_the_same(kind):
    block, x = reference_block(kind), some_x()
    theirs = {name: p.detach().numpy() for name, p in block.named_parameters()}
    gate, up = np.split(theirs["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    params = {
        "router": {"kernel": theirs["gate.weight"].T},
        "gate": {"kernel": gate},
        "up": {"kernel": up},
        "down": {"kernel": theirs["experts.down_proj"].swapaxes(1, 2)},
    }
    config = tiny(normalize=kind != "qwen3")
    with torch.no_grad():
        wanted = block(torch.tensor(x)).numpy()
    got, _ = run(config, params, x, ALL)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def logits_of(best: np.ndarray, height=3.0):
    """Logits [1, T, E] that are high for the experts each token likes."""
    likes = best[..., None] == np.arange(6)
    return jnp.asarray(height * likes.sum(1), jnp.float32)[None]


compiled_route = jax.jit(route, static_argnums=0)


def routed(logits, bias=None, is_token=None, **fields):
    if is_token is None:
        is_token = jnp.ones(logits.shape[:2], bool)
    return compiled_route(tiny(**fields).experts, logits, bias, is_token)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_perfectly_even_routing_costs_one_a_token(score):
    tokens = np.arange(12)
    even = logits_of(np.stack([tokens % 6, (tokens + 1) % 6], 1))
    _, _, sums = routed(even, score=score)
    assert sums["load"].tolist() == [4.0] * 6
    assert sums["balance"] == pytest.approx(12, rel=1e-5)
    uneven = logits_of(np.stack([tokens % 2, 1 - tokens % 2], 1))
    assert routed(uneven, score=score)[2]["balance"] > 1.3 * 12


def test_all_tokens_to_one_expert_cost_as_much_as_there_are_experts():
    _, _, sums = routed(logits_of(np.zeros((12, 1)), 50.0), top_k=1)
    assert sums["balance"] == pytest.approx(6 * 12, rel=1e-5)
    assert sums["load"].tolist() == [12, 0, 0, 0, 0, 0]
    assert sums["z"] == pytest.approx(12 * 50.0**2, rel=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_sums_are_per_row_and_without_padding(score):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)
    is_token = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    _, _, got = routed(logits, is_token=is_token, score=score)
    parts = [routed(logits[:1], score=score)[2], routed(logits[1:2, :2], score=score)[2]]
    assert_same(got, jax.tree.map(jnp.add, *parts))
    assert got["load"].sum() == 7 * 2
    changed = jnp.where(is_token[..., None], logits, 9.0)
    assert_same(routed(changed, is_token=is_token, score=score)[2], got, 0.0)


def test_padding_that_is_dropped_does_not_count():
    config, x = tiny(capacity=0.5), some_x()
    params = params_of(config)
    half = ALL & (np.arange(LENGTH) < 4)
    everything = run(config, params, x, ALL)[1]["dropped"]
    counted = run(config, params, x, half)[1]["dropped"]
    rest = run(config, params, x, ~half)[1]["dropped"]
    assert 0 < counted < everything
    assert counted + rest == everything


def test_generous_capacity_is_none_at_all():
    generous, dropless = tiny(capacity=6.0), tiny()
    params, x = params_of(dropless), some_x()
    got, sums = run(generous, params, x, ALL)
    assert_same(got, run(dropless, params, x, ALL)[0])
    assert sums["dropped"] == 0


def test_the_bias_changes_who_is_chosen_and_not_with_what_weight():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
    bias = jnp.asarray([0, 0, 0, 0, 0, 9.0])
    plain, plain_weights, _ = routed(logits, normalize=False)
    chosen, weights, sums = routed(logits, bias, normalize=False)
    assert np.all(chosen[..., 0] == 5)
    assert not np.all(plain == 5)
    scores = jax.nn.softmax(logits)
    np.testing.assert_array_equal(weights, jnp.take_along_axis(scores, chosen, 2))
    np.testing.assert_array_equal(plain_weights, jnp.take_along_axis(scores, plain, 2))
    assert sums["load"][5] == 10


@pytest.mark.parametrize("k", [1, 2, 6])
def test_top_k_is_that_of_jax(k):
    rng = np.random.default_rng(k)
    scores = rng.normal(size=(3, 40, 6)).astype("float32")
    scores[1] = rng.integers(0, 3, (40, 6))  # many are equal
    scores[2] = 0.0
    got = jax.jit(top_k, static_argnums=1)(scores, k)
    np.testing.assert_array_equal(got, jax.lax.top_k(scores, k)[1])


def test_the_bias_moves_against_the_load():
    config = tiny(bias_rate=0.25)
    params = {"embed": 1, "layers": {"mlp": {"balance_bias": jnp.zeros((2, 6)), "up": 2}}}
    load = jnp.asarray([[4.0, 4, 4, 4, 4, 4], [9, 3, 4, 4, 4, 0]])
    moved = balance(config, params, {"load": load})
    wanted = [[0.0] * 6, [-0.25, 0.25, 0, 0, 0, 0.25]]
    assert moved["layers"]["mlp"]["balance_bias"].tolist() == wanted
    assert (moved["embed"], moved["layers"]["mlp"]["up"]) == (1, 2)
    assert balance(tiny(), params, {"load": load}) is params
    dense_model = dataclasses.replace(config, experts=None)
    assert balance(dense_model, params, {}) is params


def test_the_bias_evens_the_load_out():
    config = tiny(bias_rate=0.005)
    scores = np.random.default_rng(0).normal([2.0, 1.0, 0, 0, 0, -1.0], size=(8, 16, 6))
    logits, is_token = jnp.asarray(scores, jnp.float32), jnp.ones((8, 16), bool)
    params = {"layers": {"mlp": {"balance_bias": jnp.zeros((1, 6))}}}
    loads = []
    for _ in range(150):
        bias = params["layers"]["mlp"]["balance_bias"]
        load = compiled_route(config.experts, logits, bias[0], is_token)[2]["load"]
        params = balance(config, params, {"load": load[None]})
        loads.append(load.max() / load.mean())
    assert loads[0] > 2
    assert loads[-1] < 1.3


def test_auxiliary_losses_and_metrics_are_means_over_tokens_and_layers():
    config = tiny(balance_loss=0.5, router_z_loss=0.1)
    sums = {
        "balance": jnp.asarray([10.0, 30.0]),
        "z": jnp.asarray([20.0, 60.0]),
        "load": jnp.asarray([[10.0, 0, 2, 4, 4, 0], [4, 4, 4, 4, 4, 0]]),
        "dropped": jnp.asarray([4.0, 0.0]),
    }
    tokens = jnp.asarray(10)
    got = auxiliary_loss(config, sums, tokens.astype(jnp.float32))
    assert got == pytest.approx(0.5 * 2 + 0.1 * 4)
    assert auxiliary_loss(dataclasses.replace(config, experts=None), {}, tokens) == 0
    got = {name: float(x) for name, x in metrics(config, sums, tokens.astype("float32")).items()}
    wanted = {"balance_loss": 2.0, "router_z_loss": 4.0, "dropped": 0.1}
    assert got == pytest.approx(wanted | {"expert_load_max": 3.0, "expert_load_min": 0.0})
