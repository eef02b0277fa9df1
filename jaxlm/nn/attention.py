"""Attention: one function, several backends, and the module around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.errors import UserError
from jaxlm.model_config import ModelConfig
from jaxlm.nn import flash
from jaxlm.nn.flash import MASKED, Places, flash_attention, visible
from jaxlm.nn.layers import (
    ATTENTION_PROBABILITIES,
    Dense,
    Dropout,
    Norm,
    residual_std,
)
from jaxlm.nn.packed import MOST_SEGMENTS, packed_attention
from jaxlm.nn.positions import apply_rope
from jaxlm.nn.stored import stored_attention
from jaxlm.parallel.ring import AXIS as CONTEXT_AXIS
from jaxlm.parallel.ring import ring_attention
from jaxlm.sharding import constrain

# Beyond this many scores a row, blocks win: at 2,048 tokens on a CPU, forward and backward take two
# fifths of the time of `plain` and a tenth of its memory, for a second more to compile.
MANY_SCORES = 1024 * 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """What an encoder reads: tokens [B, S] and where they stand.

    A target's segment n goes with the source's segment n, and segment 0 is padding; without
    segments there is one text a row, number 1.
    """

    tokens: jax.Array
    places: Places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, as far as they are known, as products of matrices read them."""

    k: jax.Array
    """[B, K, H, S]: of one row XLA would copy keys into this order for every token, on a CPU."""
    v: jax.Array
    """[B, K, S, H]."""
    source: "LayerCache | None" = None
    """Those of the source, in a layer that attends to one."""


def attention(
    q_btnh,
    k_bskh,
    v_bskh,
    *,
    queries: Places,
    keys: Places,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    bias_bnts=None,
    dropout: Dropout | None = None,
    dropout_rate: float = 0.0,
    backend: str = "auto",
):
    """Attention within documents; returns [B, T, N, H] in the type of `q_btnh`.

    A query sees the keys of its own segment; where it is `causal`, those whose position is at most
    its own and, with `window`, less than `window` before it. Heads are grouped: N is a multiple of
    K. `bias_bnts`, float32, is added to the scores (relative positions).

    Backends: `plain` is the reference; `stored` has a gradient of its own; `blocked` never holds
    the scores of whole rows; `xla` and `cudnn` are `jax.nn.dot_product_attention`'s. `auto` takes
    the first that can do it of `cudnn` (on NVIDIA), `blocked` (for long rows), `stored` (on CPUs),
    `plain`. Where the mesh in force splits rows (`cp`), they are in `ring_order`, and blocks go
    round a ring. Raises UserError where the named backend cannot do what it is asked to.
    """
    drops = dropout is not None and dropout_rate > 0
    among_themselves = queries is keys
    ring = _ring_size() if among_themselves else 1
    if queries.most_segments == 1 and among_themselves:
        queries = keys = Places(queries.positions)
    # A row of one token, as in initialisation, is not split.
    if ring > 1 and q_btnh.shape[1] > 1:
        _check_ring(ring, backend, drops, bias_bnts is not None)
        kernel = flash.Kernel(scale, window, softcap, _ring_block(q_btnh.shape[1], ring), causal)
        f, b = (functools.partial(f, kernel) for f in (flash.forward, flash.backward))
        return ring_attention(q_btnh, k_bskh, v_bskh, queries, keys, forward=f, backward=b)
    plain_scores = not softcap and not drops and bias_bnts is None
    fits_cudnn = plain_scores and _fits_cudnn(q_btnh, k_bskh, queries, keys, window)
    if backend == "auto":
        in_order = among_themselves or not causal
        fits_blocks = in_order and not drops and bias_bnts is None
        backend = _fastest(q_btnh, k_bskh, fits_cudnn, fits_blocks, in_order and plain_scores)
    _check_backend(backend, fits_cudnn, drops, bias_bnts is not None, softcap is not None)
    if backend == "cudnn":
        return _cudnn(q_btnh, k_bskh, v_bskh, queries, scale, causal, window)
    rule = {"queries": queries, "keys": keys, "window": window, "causal": causal, "scale": scale}
    if backend == "stored":
        return stored_attention(q_btnh, k_bskh, v_bskh, **rule)
    if backend == "blocked":
        return flash_attention(q_btnh, k_bskh, v_bskh, softcap=softcap, **rule)
    mask_bts = visible(queries, keys, window, causal)
    if backend == "xla":
        options = {"scale": scale, "mask": mask_bts[:, None], "bias": bias_bnts}
        return jax.nn.dot_product_attention(q_btnh, k_bskh, v_bskh, implementation="xla", **options)
    return _plain(
        q_btnh, k_bskh, v_bskh, mask_bts, scale, softcap, bias_bnts, dropout, dropout_rate
    )


def _fits_cudnn(q_btnh, k_bskh, queries: Places, keys: Places, window: int | None) -> bool:
    """Whether cuDNN takes these arrays, and knows this mask without an array of it.

    A row of one token, as in initialisation, is not worth it, and may be a batch that it refuses.
    """
    length = q_btnh.shape[1]
    if q_btnh.dtype != jnp.bfloat16 or length == 1 or length != k_bskh.shape[1]:
        return False
    if queries.segments is None:
        return keys.segments is None
    most = queries.most_segments
    return queries is keys and window is None and most is not None and most <= MOST_SEGMENTS


def _cudnn(q_btnh, k_bskh, v_bskh, places: Places, scale: float, causal: bool, window: int | None):
    if places.segments is not None:
        most = places.most_segments
        return packed_attention(q_btnh, k_bskh, v_bskh, places.segments, most, scale, causal)
    reach = None if window is None else (window - 1, 0)
    options = {"scale": scale, "is_causal": causal, "local_window_size": reach}
    return jax.nn.dot_product_attention(q_btnh, k_bskh, v_bskh, implementation="cudnn", **options)


def _ring_size() -> int:
    """Over how many devices the mesh in force splits rows; 1 inside a ring."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or CONTEXT_AXIS in mesh.manual_axes else mesh.shape.get(CONTEXT_AXIS, 1)


def _ring_block(length: int, ring: int) -> int:
    """A block that divides a chunk if it can, so that one into the late is rarely skipped."""
    chunk = -(-length // (2 * ring))
    return -(-chunk // -(-chunk // flash.BLOCK))


def _check_ring(size: int, backend: str, drops: bool, biased: bool) -> None:
    if backend not in ("auto", "blocked"):
        raise UserError(
            f"model.attention={backend} needs whole rows on one device, but cp={size} splits them: "
            "use model.attention=auto"
        )
    if drops:
        raise UserError(
            "model.attention_dropout needs the probabilities of a whole row, which no device holds "
            f"with cp={size}: set model.attention_dropout=0, or leave cp out of the mesh"
        )
    if biased:
        raise UserError(
            f"model.positions=relative needs the scores of whole rows, but cp={size} splits them: "
            "leave cp out of the mesh"
        )


def _check_backend(backend: str, fits_cudnn: bool, drops: bool, biased: bool, capped: bool) -> None:
    if backend == "cudnn" and not fits_cudnn:
        raise UserError(
            "model.attention=cudnn only does bfloat16 attention of rows to themselves, with up to "
            f"{MOST_SEGMENTS - 1} documents in a row and no window where there are several, and "
            "this call has more, or a source, a cache, dropout, relative positions or float32: use "
            "model.attention=auto"
        )
    if backend in ("blocked", "stored") and biased:
        raise UserError(
            f"model.attention={backend} has no place for the biases of model.positions=relative: "
            "use model.attention=auto"
        )
    if backend in ("blocked", "stored") and drops:
        raise UserError(
            f"model.attention={backend} never holds the probabilities that model.attention_dropout "
            "needs: use model.attention=auto"
        )
    if backend == "stored" and capped:
        raise UserError(
            "model.attention=stored does not support attention_softcap: use model.attention=auto"
        )


def _fastest(q_btnh, k_bskh, fits_cudnn: bool, fits_blocks: bool, fits_stored: bool) -> str:
    """What `auto` stands for."""
    small_heads = q_btnh.shape[-1] <= 128 and q_btnh.shape[-1] % 8 == 0
    if fits_cudnn and small_heads and jax.default_backend() == "gpu":
        return "cudnn"
    lengths = q_btnh.shape[1], k_bskh.shape[1]
    if fits_blocks and lengths[0] * lengths[1] > MANY_SCORES:
        return "blocked"
    # A length may be a symbol, of which blocks cannot be cut.
    known = all(isinstance(n, int) for n in lengths) and lengths[0] != 1
    return "stored" if fits_stored and known and jax.default_backend() == "cpu" else "plain"


def _plain(q_btnh, k_bskh, v_bskh, mask_bts, scale, softcap, bias_bnts, dropout, dropout_rate):
    """The reference: scores and softmax in float32."""
    batch, length, heads, head_dim = q_btnh.shape
    kv_heads = k_bskh.shape[2]
    q_btkgh = q_btnh.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    # Heads before positions: on a CPU, forward and backward take two thirds of the time. A cache is
    # so in memory.
    q, k, v = (jnp.moveaxis(x, 1, -2) for x in (q_btkgh, k_bskh, v_bskh))
    scores_bkgts = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores_bkgts = scores_bkgts * scale
    if bias_bnts is not None:
        scores_bkgts = scores_bkgts + bias_bnts.reshape(scores_bkgts.shape)
    if softcap is not None:
        scores_bkgts = softcap * jnp.tanh(scores_bkgts / softcap)
    scores_bkgts = jnp.where(mask_bts[:, None, None], scores_bkgts, MASKED)
    weights_bkgts = jax.nn.softmax(scores_bkgts, axis=-1)
    if dropout is not None:
        weights_bkgts = dropout(weights_bkgts, dropout_rate, ATTENTION_PROBABILITIES, 3)
    out_bkgth = jnp.einsum("bkgts,bksh->bkgth", weights_bkgts.astype(v.dtype), v)
    return jnp.moveaxis(out_bkgth, 3, 1).reshape(batch, length, heads, head_dim)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al., 2023) with rotary positions and a cache."""

    config: ModelConfig
    local: bool
    dtype: jnp.dtype
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        x_btd,
        *,
        places: Places,
        turns=None,
        bias_bnts=None,
        dropout: Dropout | None = None,
        cache: LayerCache | None = None,
        slot=None,
        cached: Places | None = None,
    ):
        """Attend among the tokens given or, with `cache`, to all it holds.

        The new keys and values are written from index `slot` on; `cached` says where the cache's
        S entries stand, the new ones included. Returns ([B, T, D], the cache written to).
        """
        q, k, v = (self._project(name, x_btd) for name in "qkv")
        if turns is not None:
            q, k = apply_rope(q, turns), apply_rope(k, turns)
        keys = places
        if cache is not None:
            cache = dataclasses.replace(
                cache, k=_write(cache.k, k, slot, 3), v=_write(cache.v, v, slot, 2)
            )
            (k, v), keys = _read(cache, self.dtype), cached
        return self._attend(q, k, v, places, keys, bias_bnts, dropout), cache

    def _attend(self, q_btnh, k_bskh, v_bskh, queries, keys, bias_bnts, dropout):
        c = self.config
        out_btnh = attention(
            q_btnh,
            k_bskh,
            v_bskh,
            queries=queries,
            keys=keys,
            scale=c.attention_scale or c.head_size**-0.5,
            causal=self.causal,
            window=c.sliding_window if self.local else None,
            softcap=c.attention_softcap,
            bias_bnts=bias_bnts,
            dropout=dropout,
            dropout_rate=c.attention_dropout,
            backend=c.attention,
        )
        out_btnh = constrain(out_btnh, "batch", "length", "heads", None)
        return Dense(
            (c.d_model,),
            ("heads", None, "embed"),
            self.dtype,
            c.init_mean,
            residual_std(c),
            c.out_bias,
            num_in=2,
            float8=c.float8,
            name="out",
        )(out_btnh)

    def _project(self, name: str, x_btd):
        """Queries, keys or values [B, T, N or K, H], normalised where the config asks for it."""
        c = self.config
        heads, axis = (c.num_heads, "heads") if name == "q" else (c.kv_heads, "kv_heads")
        y = Dense(
            (heads, c.head_size),
            ("embed", axis, None),
            self.dtype,
            c.init_mean,
            c.init_std,
            c.qkv_bias,
            float8=c.float8,
            name=name,
        )(x_btd)
        y = constrain(y, "batch", "length", axis, None)
        if c.qk_norm == "none" or name == "v":
            return y
        axes = (axis, None) if c.qk_norm == "all" else (None,)
        return Norm("rmsnorm", c.norm_eps, c.norm_offset, axes=axes, name=f"{name}_norm")(y)


class CrossAttention(Attention):
    """Attention of a target to the source's segment of the same number (Vaswani et al., 2017)."""

    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x_btd,
        *,
        places: Places,
        memory,
        dropout: Dropout | None = None,
        cache: LayerCache | None = None,
    ):
        """Attend to a memory: (the encoder's output [B, S, D], its places).

        Without the output to what `cache` has of it. Returns ([B, T, D], its keys and values).
        """
        q = self._project("q", x_btd)
        memory_bsd, memory_places = memory
        if memory_bsd is not None:
            k, v = (self._project(name, memory_bsd) for name in "kv")
            cache = LayerCache(
                *map(constrain_cache, (jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)))
            )
        else:
            k, v = _read(cache, self.dtype)
        return self._attend(q, k, v, places, memory_places, None, dropout), cache


def constrain_cache(x):
    """Lay a layer's cache out: rows over data axes, heads over tp."""
    return constrain(x, "batch", "kv_heads", None, None)


def _write(cache, new_btkh, slot, axis: int):
    """The cache with new keys or values; `axis` is that of its positions."""
    new = jnp.moveaxis(new_btkh, 1, axis).astype(cache.dtype)
    if cache.shape[0] == 1:  # which a loop over tokens holds without the axis of rows
        written = jax.lax.dynamic_update_slice_in_dim(cache[0], new[0], slot, axis - 1)[None]
    else:
        written = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis)
    return constrain_cache(written)


def _read(cache: LayerCache, dtype):
    """Keys and values, each [B, S, K, H]."""
    return jnp.moveaxis(cache.k, 3, 1).astype(dtype), jnp.moveaxis(cache.v, 2, 1).astype(dtype)
