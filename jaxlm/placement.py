"""Host arrays on the devices of several processes, and back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def rows_held(sharding: Sharding, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (first dimension) of a global array that this process holds, and those it answers for.

    A row whose parts are spread over processes, or that several have, is held by all of these; the
    one with the lowest number answers for it.
    """
    owners = np.full(shape[0], np.iinfo(np.int32).max)
    held = np.zeros(shape[0], bool)
    me = jax.process_index()
    for device, index in sharding.devices_indices_map(shape).items():
        owners[index[0]] = np.minimum(owners[index[0]], device.process_index)
        held[index[0]] |= device.process_index == me
    return np.flatnonzero(held), np.flatnonzero(owners == me)


def place(tree: Any, sharding: Sharding, rows: np.ndarray | None = None, count: int = 0):
    """Host arrays as global ones on the devices of all processes.

    With `rows`, ascending, the arrays hold only these of `count` rows: all that this process's
    devices need. Without, every process gives the whole.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x):
        if rows is None:
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        def part(index):
            wanted = np.arange(count)[index[0]]
            return x[(np.searchsorted(rows, wanted), *index[1:])]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def to_host(tree: Any):
    """Arrays as NumPy ones, whole in every process."""

    def fetch(x):
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, jax.tree.map(_start_copy, tree))


def _start_copy(x: jax.Array) -> jax.Array:
    if x.is_fully_addressable or x.is_fully_replicated:
        x.copy_to_host_async()
    return x
