"""Looking rows of a table up where the tokens are."""

import jax
from jax.sharding import PartitionSpec

from jaxlm.parallel import is_split
from jaxlm.sharding import axes_of, constrain, mesh_axes


def lookup(table, ids_bt, axis: str | None):
    """Rows [B, T, D] of a `table` [entries, D], whose first dimension has the logical `axis`.

    Each device looks its own tokens up. Left to itself, the compiler gathers the gradients of all
    tokens instead of adding up those of tables. The sum is made in the table's type.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tokens = mesh_axes(("batch", "length"), omit=frozenset({"pp", *mesh.manual_axes}))
    if not is_split(axes_of(tokens)):
        return table[ids_bt]
    return jax.shard_map(
        lambda table, ids: table[ids],
        in_specs=(PartitionSpec(), tokens),
        out_specs=tokens,
        axis_names=axes_of(tokens),
        check_vma=False,
    )(constrain(table, axis, None), ids_bt)
