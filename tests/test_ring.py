"""Ring attention on virtual devices against plain attention over rows in natural order."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.axes import MESH_AXES
from jaxlm.nn import flash
from jaxlm.nn.attention import attention
from jaxlm.nn.flash import Places
from jaxlm.parallel.ring import ring_attention, ring_order
from jaxlm.sharding import mesh_axes

pytestmark = pytest.mark.usefixtures("strict")

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 4, 2, 4
SCALE = 0.6
WINDOWS = [{}, {"window": 6, "softcap": 2.0}]


def make_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 6, devices=devices)


def inputs(seed=0, length=LENGTH):
    """q, k, v and the weights of a loss."""
    rng = np.random.default_rng(seed)
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    return [rng.normal(size=(BATCH, length, n, HEAD_DIM)).astype(np.float32) for n in heads]


def packed(starts) -> Places:
    """Documents that start where `starts` [B, T] is true."""
    starts = np.asarray(starts, bool).reshape(BATCH, LENGTH)
    columns = np.broadcast_to(np.arange(LENGTH), starts.shape)
    begins = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Places(jnp.asarray(columns - begins), jnp.asarray(np.cumsum(starts, axis=1)))


def loss(q, k, v, weights, places, **options):
    out = attention(q, k, v, queries=places, keys=places, scale=SCALE, **options)
    return (jnp.sin(out.astype(jnp.float32)) * weights).sum(), out


@functools.cache
def with_gradients(window=None, softcap=None, backend="auto", mesh=None):
    """A jitted function to ((loss, output), gradients of q, k and v), for one mesh in force.

    A function of its own for each mesh: `jax.jit` would compile again all the same.
    """
    options = {"window": window, "softcap": softcap, "backend": backend}
    return jax.jit(
        jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1, 2), has_aux=True)
    )


def on_mesh(mesh, arrays, places, **options):
    """`with_gradients` on a mesh, given and returning rows in natural order."""
    order = ring_order(arrays[0].shape[1], mesh.shape["cp"])
    heads = NamedSharding(mesh, mesh_axes(("batch", "length", "heads", None)))
    rows = NamedSharding(mesh, mesh_axes(("batch", "length")))
    arrays = [jax.device_put(x[:, order], heads) for x in arrays]
    places = jax.tree.map(lambda x: jax.device_put(x[:, order], rows), places)
    with jax.set_mesh(mesh):
        (value, out), gradients = with_gradients(**options, mesh=mesh)(*arrays, places)
    back = np.argsort(order)
    out, gradients = jax.tree.map(lambda x: np.asarray(x)[:, back], (out, gradients))
    return (value, out), gradients


def assert_close(ours, theirs, atol=2e-5):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=1e-4, atol=atol)


MESHES = {
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp8": {"cp": 8},
    "dp2,cp2,tp2": {"dp": 2, "cp": 2, "tp": 2},
    "fsdp2,cp4": {"fsdp": 2, "cp": 4},
}
STARTS = st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("options", WINDOWS, ids=["full", "window"])
@pytest.mark.slow
def test_values_and_gradients_are_those_of_whole_rows(sizes, options):
    mesh = make_mesh(**sizes)

    @settings(max_examples=8)
    @given(STARTS, st.integers(0, 99))
    def check(starts, seed):
        arrays, places = inputs(seed), packed(starts)
        theirs = with_gradients(**options, backend="plain")(*arrays, places)
        assert_close(on_mesh(mesh, arrays, places, **options), theirs)

    check()


def test_documents_may_come_back():
    """Any segments, in any order, with positions along the whole row."""
    rng, arrays = np.random.default_rng(0), inputs()
    columns = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    for segments in (jnp.asarray(rng.integers(0, 3, (BATCH, LENGTH))), None):
        places = Places(columns, segments)
        theirs = with_gradients(backend="plain")(*arrays, places)
        assert_close(on_mesh(make_mesh(cp=4), arrays, places), theirs)


def test_bfloat16():
    *arrays, weights = inputs()
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    places = packed(np.arange(BATCH * LENGTH) % 11 == 0)
    (_, out), gradients = on_mesh(make_mesh(cp=4), [*arrays, weights], places)
    assert out.dtype == gradients[1].dtype == jnp.bfloat16
    exact = [x.astype(np.float32) for x in arrays]
    (_, fine), fine_gradients = with_gradients(backend="plain")(*exact, weights, places)
    assert_close((out, gradients), (fine, fine_gradients), atol=0.06)


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.slow
def test_inside_a_pipeline(remat):
    """Two stages, manual over pp, each scaling its queries; the gradient is taken outside."""
    mesh = make_mesh(pp=2, cp=2, tp=2)
    *arrays, weights = inputs()
    places, scales = packed(np.arange(BATCH * LENGTH) % 13 == 0), jnp.array([0.7, 1.3])
    order = ring_order(LENGTH, 2)

    def layer(scale, x, k, v, places):
        return attention(x * scale, k, v, queries=places, keys=places, scale=SCALE, window=9)

    def stages(scale, x, k, v, places):
        run = jax.checkpoint(layer) if remat else layer

        def tick(x, _):
            y = run(scale[0], x, k, v, places)
            return jax.lax.ppermute(y, "pp", [(0, 1), (1, 0)]), None

        x, _ = jax.lax.scan(tick, x, length=2)
        return x[None]

    everywhere, stage = PartitionSpec(), PartitionSpec("pp")

    def piped(scales, q, k, v, places):
        mapped = jax.shard_map(
            stages,
            in_specs=(stage, *[everywhere] * 4),
            out_specs=stage,
            axis_names={"pp"},
            check_vma=False,
        )
        # What entered at the first stage is back there.
        return (mapped(scales, q, k, v, places)[0] * weights[:, order]).sum()

    def plain(scales, q, k, v, places):
        for scale in scales:
            q = layer(scale, q, k, v, places)
        return (q * weights).sum()

    stored, stored_places = jax.tree.map(lambda x: x[:, order], (arrays, places))
    with jax.set_mesh(mesh):
        ours = jax.jit(jax.value_and_grad(piped, (0, 1, 2, 3)))(scales, *stored, stored_places)
    theirs = jax.jit(jax.value_and_grad(plain, (0, 1, 2, 3)))(scales, *arrays, places)
    assert_close(ours[0], theirs[0])
    assert_close(ours[1][0], theirs[1][0], atol=1e-4)
    assert_close(ours[1][1:], jax.tree.map(lambda x: x[:, order], theirs[1][1:]))


def lower(function, mesh, length=LENGTH, head_dim=HEAD_DIM, batch=BATCH):
    """`function` of q, k, v and places, lowered for rows of any length on a mesh."""

    def struct(logical, *shape, dtype=jnp.float32):
        sharding = NamedSharding(mesh, mesh_axes(logical))
        return jax.ShapeDtypeStruct((batch, length, *shape), dtype, sharding=sharding)

    heads = ("batch", "length", "heads", None)
    q, k = (struct(heads, n, head_dim) for n in (HEADS, KV_HEADS))
    rows = struct(("batch", "length"), dtype=jnp.int32)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(q, k, k, Places(rows, rows))


def attend(q, k, v, places):
    return attention(q, k, v, queries=places, keys=places, scale=SCALE)


def gradient(q, k, v, places):
    return jax.grad(lambda *args: attend(*args, places).sum(), argnums=(0, 1, 2))(q, k, v)


def permutes(jaxpr) -> int:
    """How many times a program permutes an array that has heads."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            count += sum(v.aval.ndim == 4 for v in eqn.invars)
        inner = [p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        count += times * sum(permutes(getattr(p, "jaxpr", p)) for p in inner)
    return count


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.slow
def test_keys_and_values_move_one_time_less_than_there_are_devices(size):
    def jaxpr(function):
        x, p = (jnp.zeros((BATCH, LENGTH, *s)) for s in ((HEADS, HEAD_DIM), ()))
        with jax.set_mesh(make_mesh(cp=size)):
            return jax.make_jaxpr(function)(x, x, x, Places(p, p)).jaxpr

    assert permutes(jaxpr(attend)) == 2 * (size - 1)
    # Forward, backward, and the gradients all the way round.
    assert permutes(jaxpr(gradient)) == 2 * (size - 1) + 2 * (size - 1) + 2 * size


@pytest.mark.slow
def test_nothing_but_permutes_is_communicated():
    """Four arrays (keys, values, positions, segments), before and in the loop of middle steps."""
    for sizes in ({"cp": 4}, {"fsdp": 2, "cp": 4}):
        text = lower(attend, make_mesh(**sizes)).compile().as_text()
        assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 8
    for function in (attend, gradient):
        text = lower(function, make_mesh(dp=2, cp=2, tp=2)).compile().as_text()
        assert not re.findall(r" (?:all-\w+|reduce-scatter)(?:-start)?\(", text)


def layers(x_btd, kernels, places):
    """Layers of attention alone, in small blocks, so that what is held once does not count."""
    kernel = flash.Kernel(SCALE, block=64)
    forward, backward = (functools.partial(f, kernel) for f in (flash.forward, flash.backward))

    def layer(x, kernels):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in kernels)
        if jax.sharding.get_abstract_mesh().shape["cp"] > 1:
            out = ring_attention(q, k, v, places, places, forward=forward, backward=backward)
        else:
            options = {"scale": SCALE, "block": 64}
            out = flash.flash_attention(q, k, v, queries=places, keys=places, **options)
        return x + out.reshape(x.shape), None

    return jax.lax.scan(layer, x_btd, kernels)[0].sum()


@pytest.mark.slow
def test_memory_falls_with_devices():
    """In proportion, but for what a ring holds once, whatever the number of layers: the next
    device's keys and values, and the sums of gradients.
    """

    def memory(size, length=8192, head_dim=8, num_layers=6):
        mesh = make_mesh(cp=size)

        def struct(axes, *shape, dtype=jnp.float32):
            sharding = NamedSharding(mesh, mesh_axes(axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        x = struct(("batch", "length", None), 1, length, HEADS * head_dim)
        rows = struct(("batch", "length"), 1, length, dtype=jnp.int32)
        kernels = tuple(
            struct((None,) * 4, num_layers, x.shape[-1], n, head_dim)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(layers, 1)).lower(x, kernels, Places(rows, rows)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8) < 1.25 * memory(1) / 8


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ring_order_pairs_early_and_late_chunks(size):
    order = ring_order(12 * size, size)
    assert sorted(order) == list(range(12 * size))
    for device, columns in enumerate(order.reshape(size, 2, 6)):
        assert columns[0, 0] == 6 * device and columns[1, -1] == 12 * size - 6 * device - 1
        assert (np.diff(columns) == 1).all()


def test_ring_order_of_one_device_is_natural_and_needs_whole_chunks():
    assert (ring_order(7, 1) == np.arange(7)).all()
    with pytest.raises(ValueError, match="6 columns do not divide into 4 chunks"):
        ring_order(6, 2)
    with pytest.raises(ValueError, match="6 columns do not divide into 4 chunks"):
        lower(attend, make_mesh(cp=2), length=6)


def test_every_step_is_half_visible_on_every_device():
    """Counted in pairs of chunks whose block is not skipped, for each device and step."""
    size, counts = 4, []
    kernel = flash.Kernel(SCALE, block=LENGTH // (2 * size))

    def forward(q, k, v, queries, keys, columns, before):
        blocks = flash._Blocks(kernel, q, k, v, queries, keys, columns)
        spans = [blocks.keys_seen(i) for i in range(blocks.num_query_blocks)]
        pairs = sum(last - first for first, last in spans)
        jax.debug.callback(lambda pairs: counts.append(int(pairs)), pairs)
        return jnp.zeros(q.shape), jnp.zeros(q.shape[:3])

    q, k, v, _ = inputs()
    places = Places(jnp.zeros((BATCH, LENGTH), jnp.int32))
    # With no other axis than cp, since callbacks are not implemented beside automatic ones.
    mesh = jax.make_mesh(
        (size,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )
    with jax.set_mesh(mesh):
        ring = functools.partial(ring_attention, forward=forward, backward=None)
        jax.block_until_ready(jax.jit(ring)(q, k, v, places, places))
    jax.effects_barrier()
    # Two of four at a step; of its own keys also the late chunk's queries see the early keys.
    assert sorted(counts) == [2] * size * (size - 1) + [3] * size
