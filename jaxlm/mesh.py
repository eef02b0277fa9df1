"""From the text `dp4,tp2` to a `jax.sharding.Mesh` over real or virtual devices."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from jaxlm.axes import MESH_AXES, OPEN, format_mesh, parse_mesh
from jaxlm.errors import UserError
from jaxlm.xla import keep_order_on_cpu

MOST_VIRTUAL_DEVICES = 1024
# Axes that any model can use: the first to be proposed instead of a mesh that does not work.
COMMON_AXES = ("dp", "fsdp", "tp")
# What decoding has in the place of fsdp.
FOLDED = ("pp", "fsdp", "cp")


def make_mesh(
    text: str = "dp", report: Callable[[str], None] = lambda line: None, processes: int = 1
) -> Mesh:
    """A mesh with every axis of `MESH_AXES`, those not named in `text` of size 1.

    A machine without accelerators gets as many virtual CPU devices as the mesh asks for, if JAX
    has not started yet, and `report` is told; each of several processes has an equal part of them.
    Raises UserError where devices and mesh disagree.
    """
    sizes = parse_mesh(text)
    fixed = math.prod(n for n in sizes.values() if n != OPEN)
    _provide_cpu_devices(-(-fixed // processes))
    devices = _devices()
    on_cpu = devices[0].platform == "cpu"
    open_axis = next((axis for axis, n in sizes.items() if n == OPEN), None)
    if open_axis and (on_cpu or len(devices) % fixed == 0):
        sizes[open_axis] = max(1, len(devices) // fixed)
    total = math.prod(n for n in sizes.values() if n != OPEN)
    if on_cpu and total > MOST_VIRTUAL_DEVICES:
        raise UserError(
            f"mesh={text!r} needs {total} devices, but this machine has only CPUs, which can stand "
            f"in for {MOST_VIRTUAL_DEVICES} at most: use a smaller mesh"
        )
    if on_cpu and total % processes:
        nearest = " or ".join(
            f"--mesh={mesh}" for mesh in nearest_meshes(sizes, -(-total // processes) * processes)
        )
        raise UserError(
            f"mesh={text!r} has {total} devices, which do not divide over {processes} processes: "
            f"start a number of them that divides it, or use {nearest}"
        )
    if on_cpu and len(devices) < total:
        raise UserError(
            f"mesh={text!r} needs {total} devices, but JAX already started with {len(devices)}: "
            f"make the mesh before other JAX work, or set JAX_NUM_CPU_DEVICES={total}"
        )
    if not on_cpu and (total != len(devices) or (open_axis and sizes[open_axis] == OPEN)):
        raise UserError(_mismatch(text, sizes, len(devices), devices[0].device_kind))
    if on_cpu and total > 1:
        report(f"mesh {format_mesh(sizes)}: {total} virtual CPU devices on {os.cpu_count()} cores")
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * 6,
        devices=_part_of_each(devices, total, processes),
    )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["dp"] * mesh.shape["fsdp"] * mesh.shape["ep"]


def folded_mesh(mesh: Mesh) -> Mesh:
    """The same devices for decoding, which has neither pipeline nor ring: pp and cp into fsdp."""
    if mesh.shape["pp"] == mesh.shape["cp"] == 1:
        return mesh
    sizes = dict(mesh.shape)
    inside = [MESH_AXES.index(a) for a in ("dp", *FOLDED, "ep", "tp")]
    sizes["fsdp"] = math.prod(sizes[axis] for axis in FOLDED)
    sizes |= {"pp": 1, "cp": 1}
    devices = mesh.devices.transpose(inside).reshape(tuple(sizes.values()))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def nearest_meshes(
    sizes: dict[str, int],
    devices: int,
    count: int = 3,
    works: Callable[[dict[str, int]], bool] = lambda sizes: True,
) -> list[str]:
    """Meshes with `devices` devices in all that `works` accepts, those most like `sizes` first.

    Meshes over the axes that `sizes` names come before those that need another one.
    """
    axes = [axis for axis, n in sizes.items() if n != 1 or axis in COMMON_AXES]
    ones = dict.fromkeys(sizes, 1)
    fits = (ones | dict(zip(axes, c, strict=True)) for c in _factorisations(devices, len(axes)))

    def unlike(candidate):
        new_axes = sum(n != 1 and sizes[axis] == 1 for axis, n in candidate.items())
        ratios = (n / max(sizes[axis], 1) for axis, n in candidate.items())
        return new_axes, sum(abs(math.log(ratio)) for ratio in ratios)

    return [format_mesh(candidate) for candidate in sorted(filter(works, fits), key=unlike)[:count]]


def _part_of_each(devices: list[jax.Device], total: int, processes: int) -> list[jax.Device]:
    """The first `total` devices, as many of each process."""
    if len(devices) == total or processes == 1:
        return devices[:total]
    each = total // processes
    return [
        d for p in range(processes) for d in [d for d in devices if d.process_index == p][:each]
    ]


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        # JAX asserts where the platform named has no device at all.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0] or "no such device"
        raise UserError(
            f"JAX cannot start on JAX_PLATFORMS={platforms!r} ({reason}): install its driver and "
            "plug-in, or set JAX_PLATFORMS=cpu"
        ) from None


def _factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `number` as a product of `count` ordered factors."""
    if count == 1:
        yield (number,)
        return
    for first in (n for n in range(number, 0, -1) if number % n == 0):
        for rest in _factorisations(number // first, count - 1):
            yield (first, *rest)


def _provide_cpu_devices(count: int) -> None:
    """Ask for virtual CPU devices. They cost nothing where a GPU turns out to be there."""
    count = min(count, MOST_VIRTUAL_DEVICES)
    if count == 1:
        return
    keep_order_on_cpu(count)
    if "xla_force_host_platform_device_count" in os.environ["XLA_FLAGS"]:
        return
    # Too late once JAX has started: make_mesh then counts what there is.
    if jax.config.jax_num_cpu_devices < count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            return


def _mismatch(text: str, sizes: dict[str, int], devices: int, kind: str) -> str:
    product = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n not in (1, OPEN)) or "dp 1"
    total = math.prod(n for n in sizes.values() if n != OPEN)
    meshes = " or ".join(f"--mesh={mesh}" for mesh in nearest_meshes(sizes, devices))
    return (
        f"mesh={text!r} does not match this machine: {product} = {total}, but there are {devices} "
        f"devices ({kind}); use {meshes}, or JAX_PLATFORMS=cpu to rehearse on virtual CPU devices"
    )


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told of another."""
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "jaxlm" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # compiling again is slower, not wrong
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
