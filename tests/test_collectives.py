"""What compiled steps send, read from their text and held against what theory asks.

Bytes are for one device. XLA's CPU compiler has no reduce-scatter of its own: sums of which a
device keeps a part are all-reduces here.
"""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from tiny import make_program, random_batch, tiny_config

from jaxlm.axes import MESH_AXES, parse_mesh
from jaxlm.collectives import UNKNOWN, collectives, summarise
from jaxlm.mesh import make_mesh
from jaxlm.models import block
from jaxlm.optim import learning_rate, make_optimizer
from jaxlm.step import build_model, build_program

SCALARS = 64  # bytes of counts, losses and norms that go with a reduction
FLOAT = 4


# -- reading ------------------------------------------------------------------------------------


def program_text(*lines: str, computations: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule test\n{computations}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def read(*lines: str, mesh: str = "dp2,fsdp2,tp2", computations: str = ""):
    return collectives(program_text(*lines, computations=computations), make_mesh(mesh))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tp",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{}", ("dp", "fsdp", "tp")),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", None),
        ("[4,2]<=[8]", ("tp",)),
        ("[2,4]<=[8]", ("fsdp", "tp")),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[2,4]T(1,0)", ("dp",)),
        ("[2,4]<=[4,2]T(1,0)", ("dp", "fsdp")),
        ("[1,8]<=[8]", ("dp", "fsdp", "tp")),
        ("mesh['a'=2,'b'=4] {'a'}", ("dp",)),
        ("mesh['a'=4,'b'=2,'c'=1] {'b'}", ("tp",)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("dp", "tp")),
        ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", ("fsdp",)),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ("tp",)),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("mesh['a'=8] {'a':(1)2}", ("dp",)),
        ("a form to come", (UNKNOWN,)),
    ],
)
def test_groups_become_mesh_axes(groups, axes):
    found = read(f"%x = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert [c.axes for c in found] == ([] if axes is None else [axes])


@pytest.mark.parametrize(
    ("instruction", "kind", "size"),
    [
        ("f32[4,8]{1,0} all-reduce(%p)", "all-reduce", 128),
        ("(f32[4]{0}, /*index=1*/bf16[2,2]{1,0}) all-reduce(%p, %q)", "all-reduce", 24),
        ("f32[4]{0} all-reduce-start(%p)", "all-reduce", 16),
        ("f32[8]{0} all-gather(%p)", "all-gather", 32),
        ("(f32[4]{0}, f32[8]{0}) all-gather-start(%p)", "all-gather", 32),
        ("((s32[2], s32[3]), (s32[4], s32[6])) all-gather-start(%p, %q)", "all-gather", 40),
        ("f32[4]{0} reduce-scatter(%p)", "reduce-scatter", 32),
        ("(f32[2]{0}, f32[2]{0}) all-to-all(%p, %q)", "all-to-all", 16),
        ("pred[16]{0} ragged-all-to-all(%p)", "ragged-all-to-all", 16),
        ("f8e4m3fn[16]{0:T(8,128)} all-gather(%p)", "all-gather", 16),
    ],
)
def test_bytes(instruction, kind, size):
    (found,) = read(f"ROOT %x = {instruction}, replica_groups=[4,2]<=[8]")
    assert (found.kind, found.bytes, found.count, found.axes) == (kind, size, 1, ("tp",))


@pytest.mark.parametrize(
    "instruction",
    [
        "f32[4]{0} collective-permute(%p)",
        "(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p)",
    ],
)
def test_permutes(instruction):
    pairs = "source_target_pairs={{0,2},{2,0},{4,6},{6,4},{1,1}}"
    (found,) = read(f"%x = {instruction}, {pairs}")
    assert (found.kind, found.bytes, found.axes) == ("collective-permute", 16, ("fsdp",))


GATHER = 'f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], metadata={op_name="jit(traced)/w"}'
NOTED = 'backend_config={"known_trip_count":{"n":"3"}}'
LOOPS = f"""
%inner (p: f32[4]) -> f32[4] {{
  ROOT %g = {GATHER}
}}
%outer (p: f32[4]) -> f32[4] {{
  ROOT %w = f32[4] while(%p), condition=%until, body=%inner, {NOTED}
}}
%until (p: s32[]) -> pred[] {{
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%p, %limit), direction=LT
}}
%until_converged (p: f32[]) -> pred[] {{
  ROOT %less = pred[] compare(%p, %q), direction=LT
}}
"""


@pytest.mark.parametrize(
    ("instruction", "count", "is_exact"),
    [
        ("while(%p), condition=%until, body=%outer", 15, True),
        ("while(%p), condition=%until_converged, body=%outer", 3, False),
        ("conditional(%i, %p), branch_computations={%outer, %until}", 3, False),
        ("conditional(%i, %p), true_computation=%until, false_computation=%inner", 1, False),
        ("call(%p), to_apply=%outer", 3, True),
        ("((f32[4]), f32[8]) async-start(%p), calls=%inner", 1, True),
    ],
)
def test_loops_multiply_and_doubt_is_told(instruction, count, is_exact):
    (found,) = read(f"%x = f32[4] {instruction}", computations=LOOPS)
    assert (found.count, found.is_exact, found.total) == (count, is_exact, 32 * count)
    assert found.op_name == "w"


def test_a_summary_adds_up():
    found = read(
        f"%a = {GATHER}", f"%b = {GATHER}", "%c = f32[64] all-reduce(%p), replica_groups={}"
    )
    assert [(t.kind, t.axes, t.count, t.bytes) for t in summarise(found)] == [
        ("all-reduce", ("dp", "fsdp", "tp"), 1, 256),
        ("all-gather", ("tp",), 2, 64),
    ]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("all-gather", make_mesh("dp1"))


# -- theory -------------------------------------------------------------------------------------


class Audit:
    """A compiled step's collectives, and the sizes that theory speaks of."""

    def __init__(self, mesh: str, optimizer=None, **sections):
        self.config = tiny_config(**({"optim": {"name": "adamw"}} | sections))
        program = make_program(self.config, mesh, optimizer)
        self.params = program.layout.stored.params
        batch = program.put(random_batch(self.config))
        text = program.train_step.lower(program.layout.stored, batch).compile().as_text()
        self.found = collectives(text, program.mesh)
        assert all(c.is_exact for c in self.found)
        self.shape = program.mesh.shape

    def total(self, *kinds: str, axis: str, least: int = 0) -> int:
        """Bytes of these kinds along a mesh axis, alone or with others, each of `least` or more."""
        return sum(
            c.total
            for c in self.found
            if axis in c.axes and c.bytes >= least and (c.kind in kinds or not kinds)
        )

    @property
    def params_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in map(as_array, jax.tree.leaves(self.params)))

    @property
    def held_bytes(self) -> int:
        """Parameters on one device."""
        return sum(held(leaf) for leaf in jax.tree.leaves(self.params))

    def activation(self, length_axes=("cp",), rows_axes=("dp", "fsdp", "ep")) -> int:
        """Bytes of one residual stream [B, T, D] split over these axes."""
        rows = self.config.train.batch_size // math.prod(self.shape[a] for a in rows_axes)
        length = self.config.model.max_seq_len // math.prod(self.shape[a] for a in length_axes)
        return rows * length * self.config.model.d_model * FLOAT


def as_array(leaf):
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def held(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def layered(mesh: str, layers: int, **model) -> Audit:
    """A scan of so many layers, whose loss is one block: what differs is the layers'."""
    train = {"loss_block": 24}
    return Audit(
        mesh,
        model={"num_layers": layers, "stack": "scan"} | model,
        optim={"name": "sgd"},
        train=train,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_data_parallel_reduces_every_gradient_once(accumulation):
    step = Audit("dp8", train={"accumulation": accumulation, "loss_block": 8})
    assert {c.kind for c in step.found} == {"all-reduce"}
    assert 0 <= step.total(axis="dp") - step.params_bytes <= SCALARS


def test_a_pipeline_reduces_its_gradients_once_and_passes_on_once_a_tick():
    step = layered("pp2,dp4", 4)
    assert step.total(axis="dp") <= step.held_bytes + SCALARS
    hops = [c for c in step.found if c.op_name.endswith("ppermute")]
    schedule = build_model(step.config, make_mesh("pp2,dp4")).schedule
    assert {c.axes for c in hops} == {("pp",)}
    assert {c.bytes for c in hops} == {step.activation() // schedule.microbatches}
    # Forward and backward. The stages' work is done again for the latter, but not its hops.
    assert sum(c.count for c in hops) == 2 * schedule.ticks


@pytest.mark.slow
def test_an_interleaved_pipeline_passes_on_once_a_tick():
    train = {"loss_block": 24}
    parallel = {"rounds": 2, "microbatches": 6}
    model = {"num_layers": 4}
    step = Audit("pp2,dp4", model=model, optim={"name": "sgd"}, train=train, parallel=parallel)
    hops = [c for c in step.found if c.op_name.endswith("ppermute")]
    assert sum(c.count for c in hops) == 2 * (2 * 6 + 2 - 1)
    assert {c.bytes for c in hops} == {step.activation() // 6}


FSDP = {"train": {"loss_block": 24}}


def gathered_in_excess(step: Audit) -> int:
    """Bytes gathered beyond every parameter for the forward and for the backward pass, and the
    table of embeddings, which is also the head, once more.
    """
    table = step.config.model.vocab_size * step.config.model.d_model * FLOAT
    return step.total("all-gather", axis="fsdp") - 2 * step.params_bytes - table


def test_fsdp_gathers_parameters_forward_and_backward_and_nothing_else():
    step = Audit("fsdp8", **FSDP)
    assert -0.5 * step.params_bytes <= gathered_in_excess(step) <= 0
    reduced = step.total("all-reduce", "reduce-scatter", axis="fsdp") / step.params_bytes
    assert 0.85 <= reduced <= 1.3  # a tied table has two gradients
    ids = step.config.train.batch_size * step.config.model.max_seq_len * FLOAT
    exchanged = step.total("all-to-all", axis="fsdp", least=ids)
    assert exchanged <= 2 * step.activation()


def replicate(x, *_):
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def test_a_gather_of_the_optimizers_state_is_caught():
    def careless(axes):
        inner = make_optimizer(tiny_config(optim={"name": "adamw"}).optim, axes)

        def update(updates, state, params):
            updates, state = inner.update(updates, jax.tree.map(replicate, state), params)
            return updates, state

        return optax.GradientTransformation(inner.init, update)

    step = Audit("fsdp8", careless, **FSDP)
    assert gathered_in_excess(step) > step.params_bytes


def test_a_gather_of_an_activation_is_caught(monkeypatch):
    monkeypatch.setattr(block, "constrain", replicate)
    step = Audit("fsdp8", **FSDP)
    assert gathered_in_excess(step) > step.params_bytes


def test_tensor_parallel_gathers_and_scatters_each_sub_layer():
    layers = 3
    step = layered("dp4,tp2", layers)
    whole = step.activation()

    def of_a_layer(*kinds):
        in_loops = [c for c in step.found if c.count == layers and c.axes == ("tp",)]
        return sum(c.bytes for c in in_loops if c.kind in kinds)

    # Two sub-layers: inputs, forward and again for the weights' gradients, and outputs' gradients.
    assert of_a_layer("all-gather") == 6 * whole
    norms = 2 * step.config.model.d_model * FLOAT
    # Outputs, and inputs' gradients, which the CPU compiler sums apart for q, k and v, and for the
    # feed-forward's two kernels: 7 where 4 would do.
    assert 4 * whole <= of_a_layer("all-reduce", "reduce-scatter") <= 7 * whole + norms
    # Outside the layers: the head's input and its gradient, and the table of embeddings.
    outside = [c for c in step.found if c.count != layers and c.axes == ("tp",)]
    assert sum(c.total for c in outside) <= 3 * whole + 3 * step.held_bytes
    assert {c.axes for c in step.found} == {("tp",), ("dp",)}


def test_a_ring_passes_keys_and_values_round():
    step = layered("dp2,cp4", 2)
    part, cp, layers = step.activation(), 4, 2
    hops = [c for c in step.found if c.kind == "collective-permute"]
    assert {c.axes for c in hops} == {("cp",)}
    assert {c.bytes for c in hops if c.bytes >= part} == {part}
    # Keys and values forward, again backward, and their gradients, which also go home.
    wanted = 2 * (cp - 1) + 2 * (cp - 1) + 2 * cp
    assert sum(c.count for c in hops if c.bytes == part) == layers * wanted
    # Only ids go round besides, and only ids are gathered.
    ids = step.config.train.batch_size * step.config.model.max_seq_len * FLOAT
    assert step.total("collective-permute", axis="cp") - layers * wanted * part < layers * 4 * ids
    assert step.total("all-gather", axis="cp") <= 6 * ids
    assert step.total("all-reduce", axis="cp") <= 1.2 * step.params_bytes


EXPERTS = {"num_experts": 4, "top_k": 2}


def experts_bytes(step: Audit) -> int:
    return sum(
        leaf.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(as_array, step.params))
        if "mlp" in jax.tree_util.keystr(path) and "router" not in jax.tree_util.keystr(path)
    )


def test_experts_gather_tokens_and_scatter_results_on_their_axis():
    step = layered("ep4,dp2", 2, experts=EXPERTS)
    tokens = 2 * step.activation(rows_axes=("dp",))  # of two layers
    # Tokens forward and results' gradients backward; with each goes a little of its routing.
    assert 2 * tokens <= step.total("all-gather", axis="ep") <= 2.2 * tokens
    assert 2 * tokens <= step.total("reduce-scatter", axis="ep") <= 2.2 * tokens
    # Experts' gradients stay where the experts are.
    others = step.params_bytes - experts_bytes(step)
    assert step.total("all-reduce", axis="ep") <= 1.6 * others


@pytest.mark.slow
def test_experts_with_a_capacity_exchange_places():
    step = layered("ep4,dp2", 2, experts=EXPERTS | {"capacity": 1.0})
    rows, length, width = 24 // 8, 24, 48
    places = rows * 4 * (2 * length // 4) * width * FLOAT  # experts x places of an even share
    # There and back, forward and backward.
    assert step.total("all-to-all", axis="ep", least=places // 2) == 2 * 4 * places
    assert step.total("all-gather", axis="ep") == 0


# -- memory -------------------------------------------------------------------------------------

WIDE = {
    "model": {"d_model": 128, "d_ff": 128, "vocab_size": 128, "num_heads": 2, "num_kv_heads": 2},
    "train": {"batch_size": 64},
    "optim": {"name": "adamw"},
}


def test_bytes_of_a_device_fall_as_fsdp_rises():
    sizes = {}
    for devices in (1, 2, 8, 64):
        shape = parse_mesh(f"fsdp{devices}")
        types = (AxisType.Auto,) * len(MESH_AXES)
        mesh = AbstractMesh(tuple(shape.values()), MESH_AXES, axis_types=types)
        config = tiny_config(**WIDE)
        make = functools.partial(make_optimizer, config.optim)
        rate = learning_rate(config.optim, 10)
        layout = build_program(build_model(config, mesh), make, rate, config, mesh).layout
        assert layout.replicated == ()
        stored = layout.stored
        sizes[devices] = sum(
            held(leaf) for leaf in jax.tree.leaves((stored.params, stored.opt_state))
        )
    for devices, size in sizes.items():
        assert sizes[1] / devices <= size <= sizes[1] / devices + SCALARS


COMPILE = """
import jax
from tiny import make_program, random_batch, tiny_config
config = tiny_config(**{wide})
program = make_program(config, "fsdp64")
batch = program.put(random_batch(config))
compiled = program.train_step.lower(program.layout.stored, batch).compile()
leaves = jax.tree.leaves(program.layout.stored)
total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
print(compiled.memory_analysis().argument_size_in_bytes, total)
"""


@pytest.mark.slow
def test_sixty_four_devices_compiled():
    tests = Path(__file__).parent
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "64",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(wide=WIDE)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    argument, total = map(int, done.stdout.split())
    batch = 5 * 24 * FLOAT  # one row of five arrays
    assert total / 64 <= argument <= total / 64 + batch + 2 * SCALARS
