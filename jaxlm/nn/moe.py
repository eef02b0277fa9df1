"""A mixture of experts in place of the feed-forward layer: Mixtral, Qwen3-MoE, DeepSeek."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.model_config import ModelConfig
from jaxlm.nn.activations import hidden_units
from jaxlm.nn.layers import MLP, Dense, gaussian, residual_std
from jaxlm.parallel.experts import run_experts
from jaxlm.sharding import constrain, with_axes

KERNEL_AXES = {
    "up": ("experts", "embed", "mlp"),
    "gate": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}


class Kernels(nn.Module):
    """One matrix per expert, [E, *shape]."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    init_mean: float
    init_std: float

    @nn.compact
    def __call__(self):
        init = with_axes(gaussian(self.init_mean, self.init_std), self.axes)
        return self.param("kernel", init, self.shape)


class Experts(nn.Module):
    """Feed-forward experts of which a router chooses some for each token (Shazeer et al., 2017).

    Routing is in float32. Auxiliary losses are taken over each row, hence add up over any split of
    a batch.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_btd, is_token_bt):
        """Returns ([B, T, D], sums over the tokens that `is_token` marks, see `route`)."""
        c, e = self.config, self.config.experts
        logits_bte = Dense(
            (e.num_experts,),
            ("embed", None),
            jnp.dtype(jnp.float32),
            c.init_mean,
            c.init_std,
            name="router",
        )(x_btd.astype(jnp.float32))
        logits_bte = constrain(logits_bte, "batch", "length", None)
        bias_e = None
        if e.bias_rate:
            zeros = with_axes(nn.initializers.zeros_init(), (None,))
            bias_e = self.param("balance_bias", zeros, (e.num_experts,))
        chosen_btk, weights_btk, sums = route(e, logits_bte, bias_e, is_token_bt)
        capacity = None
        if e.capacity is not None:
            share = e.capacity * x_btd.shape[1] * e.top_k / e.num_experts
            capacity = max(1, math.ceil(share))
        kernels = self._kernels()
        axes = {name: KERNEL_AXES[name] for name in kernels}
        x_btd = constrain(x_btd, "batch", "length", None)
        y_btd, dropped_bt = x_btd, jnp.zeros_like(is_token_bt)
        if not self.is_initializing():  # on one token, which no mesh splits
            y_btd, dropped_bt = run_experts(
                self._apply_experts, kernels, axes, x_btd, chosen_btk, weights_btk, capacity
            )
        sums["dropped"] = jnp.sum(dropped_bt, where=is_token_bt).astype(jnp.float32)
        if e.d_shared:
            shared = dataclasses.replace(c, d_ff=e.d_shared)
            y_btd = y_btd + MLP(shared, self.dtype, name="shared")(x_btd)
        return y_btd, sums

    def _kernels(self) -> dict:
        c, e = self.config, self.config.experts
        width = e.d_ff or c.d_ff
        names = ("up", "gate", "down") if c.is_gated else ("up", "down")
        kernels = {}
        for name in names:
            shape = (width, c.d_model) if name == "down" else (c.d_model, width)
            std = residual_std(c) if name == "down" else c.init_std
            module = Kernels(
                (e.num_experts, *shape), KERNEL_AXES[name], c.init_mean, std, name=name
            )
            kernels[name] = module().astype(self.dtype)
        return kernels

    def _apply_experts(self, kernels, rows, sizes):
        """All experts of a device: on rows [R, D] in groups, or on rows [E, R, D]."""

        def multiply(x, kernel):
            if sizes is None:
                return jnp.einsum("erd,edf->erf", x, kernel)
            return jax.lax.ragged_dot(x, kernel, sizes)

        gate = multiply(rows, kernels["gate"]) if "gate" in kernels else None
        hidden = hidden_units(self.config.mlp, multiply(rows, kernels["up"]), gate)
        hidden = constrain(hidden, *[None] * (hidden.ndim - 1), "mlp")
        return constrain(multiply(hidden, kernels["down"]), *[None] * hidden.ndim)


def route(experts, logits_bte, bias_e, is_token_bt):
    """Which experts a token goes to: ids [B, T, k], their weights [B, T, k], and sums of

    `balance`: each row's load-balancing loss E * sum_e (share of assignments) (mean score), 1 when
    even (Fedus et al., 2021), times its tokens; `z`: log-normaliser squared; `load` [E]:
    assignments of each expert.
    """
    e, k = experts.num_experts, experts.top_k
    is_softmax = experts.score == "softmax"
    scores_bte = jax.nn.softmax(logits_bte) if is_softmax else jax.nn.sigmoid(logits_bte)
    chosen_btk = top_k(scores_bte if bias_e is None else scores_bte + bias_e[None, None], k)
    is_chosen_btke = chosen_btk[..., None] == jnp.arange(e)[None, None, None, :]
    weights_btk = jnp.sum(jnp.where(is_chosen_btke, scores_bte[:, :, None, :], 0.0), axis=-1)
    if experts.normalize:
        weights_btk = weights_btk / (weights_btk.sum(-1, keepdims=True) + 1e-20)
    real_bt = is_token_bt.astype(jnp.float32)
    tokens_b = real_bt.sum(1)
    load_be = jnp.einsum("btke,bt->be", is_chosen_btke.astype(jnp.float32), real_bt)
    shares_bte = scores_bte if is_softmax else scores_bte / scores_bte.sum(-1, keepdims=True)
    score_be = jnp.einsum("bte,bt->be", shares_bte, real_bt)
    # (load / (tokens k)) (score / tokens) E, times tokens: one division left.
    balance_b = e * jnp.sum(load_be * score_be, -1) / (k * jnp.maximum(tokens_b, 1.0))
    z_bt = jnp.square(jax.nn.logsumexp(logits_bte, axis=-1))
    sums = {
        "balance": balance_b.sum(),
        "z": jnp.sum(z_bt * real_bt),
        "load": load_be.sum(0),
    }
    return chosen_btk, weights_btk * experts.scale, sums


def top_k(scores_bte, k: int):
    """Indices [B, T, k] of the k largest, largest first, the lower index where they are equal.

    One maximum after another: the compiler splits those over any mesh, and a sort it would gather.
    """
    chosen = []
    scores_bte = jax.lax.stop_gradient(scores_bte)
    for _ in range(k):
        best_bt = jnp.argmax(scores_bte, axis=-1).astype(jnp.int32)
        chosen.append(best_bt)
        taken = best_bt[..., None] == jnp.arange(scores_bte.shape[-1])[None, None, :]
        scores_bte = jnp.where(taken, -jnp.inf, scores_bte)
    return jnp.stack(chosen, axis=-1)


def auxiliary_loss(config: ModelConfig, sums, tokens):
    """What the load-balancing and router-z losses add to the loss: means over tokens and layers."""
    e = config.experts
    if e is None:
        return 0.0
    total = e.balance_loss * sums["balance"] + e.router_z_loss * sums["z"]
    return total.mean() / tokens


def balance(config: ModelConfig, params, sums):
    """The parameters with each expert's bias moved against its load (Wang et al., 2024)."""
    if config.experts is None or not config.experts.bias_rate:
        return params
    load_le = sums["load"]
    layers = params["layers"]
    step_le = config.experts.bias_rate * jnp.sign(load_le.mean(1, keepdims=True) - load_le)
    mlp = layers["mlp"] | {"balance_bias": layers["mlp"]["balance_bias"] + step_le}
    return params | {"layers": layers | {"mlp": mlp}}


def metrics(config: ModelConfig, sums, tokens) -> dict[str, jax.Array]:
    """Scalars on the experts' work, the mean over layers unless the name says otherwise."""
    if config.experts is None:
        return {}
    load_le = sums["load"] / jnp.maximum(sums["load"].mean(1, keepdims=True), 1.0)
    return {
        "balance_loss": sums["balance"].mean() / tokens,
        "router_z_loss": sums["z"].mean() / tokens,
        "expert_load_max": load_le.max(),
        "expert_load_min": load_le.min(),
        "dropped": sums["dropped"].mean() / (tokens * config.experts.top_k),
    }
