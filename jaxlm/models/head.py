"""What makes logits of hidden states: of the vocabulary, or of a classifier's labels."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.model_config import ModelConfig
from jaxlm.nn.layers import Dense, gaussian, is_whole
from jaxlm.sharding import constrain, with_axes

VOCABULARY_HEAD, LABEL_HEAD = HEADS = "head", "classifier"
"""Where a model's parameters have its head."""
POOLER = "dense"
"""Where a label head's have what comes before its logits."""


class VocabularyHead(nn.Module):
    """Logits [B, T, V], float32; `bias` where asked for, `kernel` unless embeddings are tied.

    If they are, it may be given the table's transpose for a kernel (`head_params`).
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden_btd, table_vd):
        c = self.config
        if c.tie_embeddings and c.scale_logits:
            hidden_btd = hidden_btd * jnp.asarray(c.d_model**-0.5, hidden_btd.dtype)
        if c.tie_embeddings and not self.has_variable("params", "kernel"):
            matrix, subscripts = table_vd, "btd,vd->btv"
        else:
            init = with_axes(gaussian(c.init_mean, c.init_std), ("embed", "vocab"))
            matrix = self.param("kernel", init, (c.d_model, c.vocab_size))
            subscripts = "btd,dv->btv"
        logits_btv = _project(subscripts, hidden_btd.astype(self.dtype), matrix)
        if c.logits_bias:
            zeros = with_axes(nn.initializers.zeros_init(), ("vocab",))
            bias = self.param("bias", zeros, (c.vocab_size,))
            logits_btv = logits_btv + jnp.broadcast_to(bias, logits_btv.shape)
        logits_btv = constrain(logits_btv, "batch", "length", "vocab")
        if c.logit_softcap is not None:
            logits_btv = c.logit_softcap * jnp.tanh(logits_btv / c.logit_softcap)
        return logits_btv


class LabelHead(nn.Module):
    """Logits [B, T, number of labels], float32: `out`, of an encoder with a bias, and before it,
    where asked for, `dense` and tanh. Without labels there is no `out`.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pooled_btd):
        c = self.config
        init = {"init_mean": c.init_mean, "init_std": c.init_std}
        biased = c.kind == "encoder"
        if c.pooler:
            dense = Dense(
                (c.d_model,), ("embed", None), self.dtype, **init, use_bias=True, name=POOLER
            )
            pooled_btd = jnp.tanh(dense(pooled_btd))
        if c.labels is None:
            return pooled_btd
        out = Dense(
            (len(c.labels),), ("embed", None), jnp.float32, **init, use_bias=biased, name="out"
        )
        return constrain(out(pooled_btd), "batch", "length", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(subscripts: str, hidden_btd, matrix):
    """A product in the type of `hidden_btd`, given in float32.

    Its gradient multiplies in that type, too, and gives the matrix's in float32.
    """
    return _product(subscripts, hidden_btd, matrix.astype(hidden_btd.dtype))


def _project_forward(subscripts: str, hidden_btd, matrix):
    return _project(subscripts, hidden_btd, matrix), (hidden_btd, matrix)


def _project_backward(subscripts: str, saved, slope_btv):
    hidden_btd, matrix = saved
    dtype = hidden_btd.dtype
    inputs, out = subscripts.split("->")
    hidden, weights = inputs.split(",")
    slope_btv = slope_btv.astype(dtype)
    in_hidden = _product(f"{out},{weights}->{hidden}", slope_btv, matrix.astype(dtype))
    in_matrix = _product(f"{hidden},{out}->{weights}", hidden_btd, slope_btv)
    return in_hidden.astype(dtype), in_matrix.astype(matrix.dtype)


_project.defvjp(_project_forward, _project_backward)


def _product(subscripts: str, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def head_params(config: ModelConfig, params: dict) -> dict:
    """Those of a model's parameters that `head_logits` reads, as a loss wants them, block by block.

    For a CPU a tied table [V, D] is turned once: its gradient would turn each block's slopes.
    """
    if config.labels is not None:
        return {LABEL_HEAD: params[LABEL_HEAD]}
    head = params.get(VOCABULARY_HEAD, {})
    if not config.tie_embeddings:
        return {VOCABULARY_HEAD: head}
    if jax.default_backend() == "cpu" and is_whole():
        turned = params["embed"]["embedding"].T
        return {VOCABULARY_HEAD: head | {"kernel": turned}}
    return {VOCABULARY_HEAD: head, "embed": params["embed"]}


def init_head(config: ModelConfig, dtype, key, embedding) -> dict:
    """A head's parameters: `head` of the vocabulary, nothing where it is the embedding alone;
    `classifier` of labels, or of an encoder's pooler alone.
    """
    x = jnp.zeros((1, 1, config.d_model), dtype)
    if config.labels is not None or config.pooler:
        return {LABEL_HEAD: LabelHead(config, dtype).init(key, x)["params"]}
    boxed = VocabularyHead(config, dtype).init(key, x, embedding)
    return {VOCABULARY_HEAD: boxed["params"]} if "params" in boxed else {}


def head_logits(config: ModelConfig, dtype, params, hidden_btd):
    """Logits, float32, of hidden states [B, T, D]: of labels, or else of the vocabulary."""
    if config.labels is not None:
        return LabelHead(config, dtype).apply({"params": params[LABEL_HEAD]}, hidden_btd)
    table_vd = params["embed"]["embedding"] if "embed" in params else None
    return VocabularyHead(config, dtype).apply(
        {"params": params.get(VOCABULARY_HEAD, {})}, hidden_btd, table_vd
    )
