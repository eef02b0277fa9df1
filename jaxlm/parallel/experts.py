"""Expert parallelism: tokens go to the devices that hold their experts, and come back.

Two ways. Without a capacity no token is dropped: tokens are gathered over `ep`, each device sorts
those of its experts together for a grouped matrix product (Gale et al., 2022), and results are
summed back to where the tokens live. With a capacity, every expert has as many places in a row of
the batch as the config says, the same on any mesh (Lepikhin et al., 2020): places are exchanged by
all-to-all.

Rows are moved by gathers alone, backward too: scattered sums would come out differently each time
on a GPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel import is_split, summable
from jaxlm.sharding import axes_of, mesh_axes


def run_experts(
    apply: Callable, kernels, axes, x_btd, chosen_btk, weights_btk, capacity: int | None
):
    """Send each token of `x` [B, T, D] to its `chosen` experts, k ids a token, and add up what they
    return by `weights`; returns ([B, T, D], assignments dropped of each token [B, T], int32).

    `apply(kernels, rows, sizes)` is the experts a device holds: on `rows` [R, D] sorted by expert
    with `sizes` rows each (int32 [E]; rows behind their sum are padding), or, with `sizes` None,
    on `rows` [E, R, D]. `kernels` is a tree of parameters [E, ...] whose logical axes are the
    leaves of `axes`. `capacity` is in places per expert and row; None drops nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = frozenset(mesh.manual_axes)
    tokens = mesh_axes(("batch", "length", None), omit=manual)
    named = (axes_of(tokens) | {"fsdp", "ep"}) - manual
    if not is_split(named):
        return _compute(apply, kernels, x_btd, chosen_btk, weights_btk, capacity, 1)
    specs = jax.tree.map(
        lambda p, names: _kernel_spec(p.shape, names, mesh.shape["fsdp"], manual), kernels, axes
    )

    def on_device(kernels, x, chosen, weights):
        kernels = jax.tree.map(_gather_width, kernels, specs)
        return _compute(apply, kernels, x, chosen, weights, capacity, mesh.shape["ep"])

    return jax.shard_map(
        on_device,
        in_specs=(specs, tokens, tokens, tokens),
        out_specs=(tokens, PartitionSpec(*tokens[:2])),
        axis_names=named,
        check_vma=False,
    )(kernels, x_btd, chosen_btk, weights_btk)


def _kernel_spec(shape, names, fsdp: int, manual: frozenset) -> PartitionSpec:
    """Experts over ep and, where it divides, width over fsdp: what it is gathered from here."""
    split = lambda n, name: name == "embed" and n % fsdp == 0 and "fsdp" not in manual  # noqa: E731
    widths = ["fsdp" if split(n, name) else None for n, name in zip(shape, names, strict=True)]
    return PartitionSpec("ep", *widths[1:])


def _gather_width(kernel, spec: PartitionSpec):
    if "fsdp" not in spec:
        return kernel
    return _gather(kernel, "fsdp", tuple(spec).index("fsdp"))


def _compute(apply: Callable, kernels, x_btd, chosen_btk, weights_btk, capacity, ep: int):
    """The tokens of one device; returns ([B, T, D], assignments dropped of each token [B, T])."""
    batch, length, width = x_btd.shape
    top_k = chosen_btk.shape[2]
    if capacity is None:
        x, chosen = x_btd.reshape(-1, width), chosen_btk.reshape(-1, top_k)
        weights, dropped = weights_btk.reshape(-1, top_k), jnp.zeros((batch, length), jnp.int32)
        out = _dropless(apply, kernels, x, chosen, weights, ep)
    else:
        x, kept, weights = x_btd, _places(chosen_btk, capacity, kernels, ep), weights_btk
        dropped = jnp.sum(kept < 0, axis=-1, dtype=jnp.int32)
        out = _with_capacity(apply, kernels, x, kept, weights, capacity, ep)
    return out.reshape(batch, length, width).astype(x_btd.dtype), dropped


def _dropless(apply: Callable, kernels, x_nd, chosen_nk, weights_nk, ep: int):
    """Every token to every expert it chose: gathered, sorted, multiplied in groups, summed."""
    if ep > 1:
        x_nd, weights_nk = _gather(x_nd, "ep", 0), _gather(weights_nk, "ep", 0)
        chosen_nk = jax.lax.all_gather(chosen_nk, "ep", axis=0, tiled=True)
    tokens, top_k = chosen_nk.shape
    experts = _num_experts(kernels)
    first = experts * jax.lax.axis_index("ep") if ep > 1 else 0
    expert = chosen_nk.reshape(-1) - first
    is_here = (expert >= 0) & (expert < experts)
    expert = jnp.where(is_here, expert, experts)
    sizes = jnp.bincount(expert, length=experts + 1)[:experts].astype(jnp.int32)
    # Assignments in order of expert, those of other devices last; a token has k experts at most.
    rows = tokens * min(top_k, experts)
    by_expert = jnp.argsort(expert, stable=True)
    places = jnp.argsort(by_expert)
    places = jnp.where(is_here, places, rows).reshape(tokens, top_k)
    by_expert = jnp.where(jnp.arange(rows) < sizes.sum(), by_expert[:rows], tokens * top_k)
    out_rows = apply(kernels, _to_rows(x_nd, by_expert, places), sizes)
    out_nkd = _from_rows(out_rows, by_expert, places)
    out_nd = jnp.einsum("nkd,nk->nd", out_nkd, weights_nk.astype(out_nkd.dtype))
    if ep == 1:
        return out_nd
    wide = out_nd.astype(summable(out_nd.dtype))
    return jax.lax.psum_scatter(wide, "ep", scatter_dimension=0, tiled=True)


def _places(chosen_btk, capacity: int, kernels, ep: int):
    """The place of each assignment [B, T, k] among its row's E * capacity, -1 if it is dropped.

    Earlier tokens go first.
    """
    batch = chosen_btk.shape[0]
    flat = chosen_btk.reshape(batch, -1)
    is_chosen = flat[:, :, None] == jnp.arange(_num_experts(kernels) * ep)[None, None, :]
    before = jnp.cumsum(is_chosen, axis=1, dtype=jnp.int32) - is_chosen.astype(jnp.int32)
    rank = jnp.sum(jnp.where(is_chosen, before, 0), axis=2)
    return jnp.where(rank < capacity, flat * capacity + rank, -1).reshape(chosen_btk.shape)


def _with_capacity(apply: Callable, kernels, x_btd, kept_btk, weights_btk, capacity: int, ep: int):
    """Tokens to their expert's places, places to their expert's device by all-to-all, and back."""
    batch, _, width = x_btd.shape
    top_k, experts = kept_btk.shape[2], _num_experts(kernels)
    slots = experts * ep * capacity
    rows = batch * slots
    in_row = slots * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    places = jnp.where(kept_btk < 0, rows, kept_btk + in_row).reshape(-1, top_k)
    assignments = jnp.arange(places.size, dtype=jnp.int32)
    empty = jnp.full((rows + 1,), places.size, jnp.int32)
    source = empty.at[places.reshape(-1)].set(assignments)[:rows]
    sent = _to_rows(x_btd.reshape(-1, width), source, places)
    # [B, ep, E, C, D] -> on the experts' devices [E, ep * B * C, D]
    sent = jnp.moveaxis(sent.reshape(batch, ep, experts, capacity, width), 0, 2)
    if ep > 1:
        sent = jax.lax.all_to_all(sent, "ep", split_axis=0, concat_axis=0)
    work = jnp.moveaxis(sent, 1, 0).reshape(experts, -1, width)
    done = apply(kernels, work, None).reshape(experts, ep, batch, capacity, width)
    done = jnp.moveaxis(done, 0, 1)
    if ep > 1:
        done = jax.lax.all_to_all(done, "ep", split_axis=0, concat_axis=0)
    out_nkd = _from_rows(jnp.moveaxis(done, 2, 0).reshape(rows, width), source, places)
    weights_nk = weights_btk.reshape(-1, top_k)
    return jnp.einsum("nkd,nk->nd", out_nkd, weights_nk.astype(out_nkd.dtype))


@jax.custom_vjp
def _to_rows(x_nd, source_r, places_nk):
    """Rows [R, D] of the tokens that `source` names as token * k + choice; zeros past the last.

    `places` [N, k] is the way back: the row of each assignment, or R for none.
    """
    return _rows_or_zeros(x_nd, source_r // places_nk.shape[1])


def _to_rows_backward(residuals, gradient_rd):
    _, places_nk = residuals
    return _rows_or_zeros(gradient_rd, places_nk).sum(1), None, None


_to_rows.defvjp(
    lambda x, source, places: (_to_rows(x, source, places), (source, places)), _to_rows_backward
)


@jax.custom_vjp
def _from_rows(y_rd, source_r, places_nk):
    """Each assignment's row [N, k, D], zeros where it has none."""
    return _rows_or_zeros(y_rd, places_nk)


def _from_rows_backward(residuals, gradient_nkd):
    source_r, _ = residuals
    return _rows_or_zeros(gradient_nkd.reshape(-1, gradient_nkd.shape[2]), source_r), None, None


_from_rows.defvjp(
    lambda y, source, places: (_from_rows(y, source, places), (source, places)),
    _from_rows_backward,
)


def _rows_or_zeros(x, index):
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _num_experts(kernels) -> int:
    """Experts on this device."""
    return jax.tree.leaves(kernels)[0].shape[0]


def _gather(x, axis: str, dim: int):
    wide = x.astype(summable(x.dtype))
    return jax.lax.all_gather(wide, axis, axis=dim, tiled=True).astype(x.dtype)
