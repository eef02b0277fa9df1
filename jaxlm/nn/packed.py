"""cuDNN's flash attention over rows that hold several documents: its packed layout.

JAX has it, but `jax.nn.dot_product_attention` does not hand it on.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

MOST_SEGMENTS = 64
"""Beyond this many in a row, the kernel's empty blocks cost more than the scores."""


def packed_attention(q_btnh, k_bskh, v_bskh, segments_bt, most: int, scale: float, causal: bool):
    """Attention within the segments of each row, at most `most` of them; [B, T, N, H].

    A segment is a run of equal numbers; padding behind the last is one, too, so that every place
    is written.
    """
    sizes, starts = segment_bounds(segments_bt, most)
    return dot_product_attention(
        q_btnh,
        k_bskh,
        v_bskh,
        q_seqlen=sizes,
        kv_seqlen=sizes,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
    )


def segment_bounds(segments_bt, most: int) -> tuple[jax.Array, jax.Array]:
    """(sizes [B, most], starts [B, most + 1]) of the runs of equal numbers, -1 where there is none.

    Of a row with more runs the rest is left out.
    """
    length = segments_bt.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)
    differs = segments_bt[:, 1:] != segments_bt[:, :-1]
    begins = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    # The n-th start is at the column that has n others before it.
    number = jnp.cumsum(begins, axis=1) - 1
    places = jnp.arange(most + 1, dtype=number.dtype)
    is_start = begins[:, :, None] & (number[:, :, None] == places[None, None, :])
    found = jnp.where(is_start, columns[None, :, None], length).min(axis=1)
    sizes = jnp.diff(found, axis=1)
    missing = found == length
    return jnp.where(missing[:, :-1], -1, sizes), jnp.where(missing, -1, found).at[:, -1].set(-1)
