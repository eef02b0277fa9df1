"""The sharding table, padded storage, and what a mesh cannot split."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import make_program, random_batch, tiny_config

from jaxlm.errors import UserError
from jaxlm.mesh import make_mesh
from jaxlm.misfit import check_fits
from jaxlm.models.decoder import Decoder
from jaxlm.sharding import (
    axes_like,
    constrain,
    make_layout,
    mesh_axes,
    path_name,
    replicated_sharding,
    split_boxes,
    storage_spec,
)
from jaxlm.step import on_mesh


def test_logical_axes_become_mesh_axes():
    assert mesh_axes(("layers", "embed", "mlp")) == P("pp", "fsdp", "tp")
    assert mesh_axes(("batch", None, "vocab")) == P(("dp", "fsdp", "ep", "pp"), None, "tp")
    omit = frozenset({"tp", "dp", "pp"})
    assert mesh_axes(("batch", "residual_length"), omit=omit) == P(("fsdp", "ep"), "cp")


@pytest.mark.parametrize(
    ("axes", "mesh_axis"),
    [
        (("heads", "kv_heads"), "tp"),
        (("batch", "embed"), "fsdp"),
        (("residual_length", "mlp"), "tp"),
        (("vocab", "vocab"), "tp"),
    ],
)
def test_two_logical_axes_that_want_one_mesh_axis(axes, mesh_axis):
    with pytest.raises(
        ValueError, match=f"{axes[0]}.*{axes[1]}.*both want mesh axis '{mesh_axis}'"
    ):
        mesh_axes(axes)


def test_an_axis_the_table_lacks():
    with pytest.raises(ValueError, match=r"'embde' is not in sharding\.RULES"):
        mesh_axes(("embde",))


def test_constrain_acts_on_cpu_and_only_under_a_mesh():
    mesh = make_mesh("dp2,tp2")
    x = jax.device_put(jnp.zeros((8, 6)), replicated_sharding(mesh))
    laid_out = jax.jit(on_mesh(lambda x: constrain(x, "batch", "mlp"), mesh))(x)
    assert laid_out.sharding.shard_shape(x.shape) == (4, 3)
    assert constrain(x, "batch", "mlp") is x


def test_fsdp_moves_to_the_first_dimension_it_divides():
    mesh = make_mesh("fsdp4,tp2")
    spec = functools.partial(storage_spec, mesh=mesh)
    assert spec((3, 8, 10), ("layers", "embed", "mlp")) == P("pp", "fsdp", "tp")
    assert spec((4, 6, 10, 8), ("layers", "embed", "heads", None)) == P("pp", None, "tp", "fsdp")
    assert spec((4, 6, 10), ("layers", "embed", "mlp")) == P("pp", None, "tp")
    assert spec((7,), ()) == P(None)


def test_what_fsdp_cannot_divide_is_listed():
    shapes = {
        "a": jax.ShapeDtypeStruct((6,), "float32"),
        "b": jax.ShapeDtypeStruct((8,), "float32"),
    }
    layout = make_layout(shapes, {"a": ("embed",), "b": ("embed",)}, make_mesh("fsdp4"))
    assert layout.replicated == ("a (6,)",)
    assert (
        make_layout(shapes, {"a": ("embed",), "b": ("embed",)}, make_mesh("dp4")).replicated == ()
    )


@pytest.mark.parametrize("mesh", ["tp2", "tp3", "fsdp2,tp2"])
@pytest.mark.parametrize(("vocab", "width"), [(7, 5), (13, 1), (12, 4), (1, 2), (101, 3)])
def test_storing_pads_and_reading_brings_back(vocab, width, mesh):
    mesh = make_mesh(mesh)
    x = np.arange(1.0, 1 + vocab * width, dtype=np.float32).reshape(vocab, width)
    shapes = {"table": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    layout = make_layout(shapes, {"table": ("vocab", "embed")}, mesh)
    stored = layout.to_stored({"table": jax.device_put(x, layout.exact["table"].sharding)})
    assert stored["table"].shape == (vocab + -vocab % mesh.shape["tp"], width)
    assert stored["table"].sharding.is_equivalent_to(layout.shardings["table"], 2)
    assert not np.asarray(stored["table"])[vocab:].any()
    back = layout.to_exact(stored)["table"]
    assert back.sharding.is_equivalent_to(layout.exact["table"].sharding, 2)
    np.testing.assert_array_equal(back, x)


def twins(layout):
    """(parameter, leaf of the optimiser's state) where the leaf's path ends in the parameter's."""
    params = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(layout.stored.params)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout.stored.opt_state):
        for name, param in params.items():
            if path_name(path).endswith("/" + name) and leaf.shape == param.shape:
                yield param, leaf


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("muon", 1), ("lion", 1), ("sgd", 1)])
def test_moments_are_laid_out_like_their_parameters(name, moments):
    optim = {"name": name, "momentum": 0.9} if name == "sgd" else {"name": name}
    layout = make_program(tiny_config(optim=optim), "fsdp4,tp2").layout
    pairs = list(twins(layout))
    assert len(pairs) >= moments * len(jax.tree.leaves(layout.stored.params))
    assert {leaf.sharding == param.sharding for param, leaf in pairs} == {True}


def test_adafactor_keeps_little_and_lays_it_out():
    config = tiny_config(model={"d_model": 192, "d_ff": 256}, optim={"name": "adafactor"})
    layout = make_program(config, "fsdp4,tp2").layout
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(layout.stored.opt_state) < count(layout.stored.params) * 0.6
    assert {leaf.sharding == param.sharding for param, leaf in twins(layout)} == {True}


def test_a_leaf_that_mirrors_no_parameter_has_no_axes():
    params = {"w": jnp.zeros((4, 6))}
    state = {"count": jnp.zeros(()), "m": params, "row": {"w": jnp.zeros((4,))}}
    axes = axes_like(state, params, {"w": ("embed", "mlp")})
    assert axes == {"count": (), "m": {"w": ("embed", "mlp")}, "row": {"w": ()}}


def test_fsdp_splits_every_parameter_and_the_bytes_by_eight():
    config = tiny_config(model={"vocab_size": 104, "d_ff": 96}, optim={"name": "adamw"})
    program = make_program(config, "fsdp8")
    assert program.layout.replicated == ()
    for leaf in jax.tree.leaves(program.layout.stored.params):
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size
    state = program.init()
    leaves = jax.tree.leaves((state.params, state.opt_state))
    total = sum(leaf.nbytes for leaf in leaves)
    on_device = [sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves) for i in range(8)]
    assert max(on_device) <= total / 8 * 1.02
    assert total >= 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_no_parameter_lacks_axes():
    config = tiny_config(model={"preset": "gpt2-tiny", "norm_bias": True, "num_kv_heads": None})
    _, axes = split_boxes(jax.eval_shape(Decoder(config.model).init, jax.random.key(0)))
    for names in jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        assert set(names) - {None, "layers"}


def test_a_batch_is_split_by_rows():
    config = tiny_config()
    tokens = make_program(config, "dp2,fsdp2,tp2").put(random_batch(config)).tokens
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(6, 24)}


CP_CONFLICT = {"experts": {"num_experts": 8, "capacity": 1.5}}
LOCAL = {"layer_pattern": ["local", "global"], "sliding_window": 4}
DEEP = {"num_layers": 4}
# What the mesh cannot split, the fields of the config, and what the sentence says.
MISFITS = {
    "heads": ("tp5", {}, ["model.num_heads=12", "tp=5: use a multiple of 5", "--mesh=tp4"]),
    "kv heads": (
        "dp2,tp4",
        {"model": {"num_kv_heads": 6}},
        ["model.num_kv_heads=6", "tp=4", "--mesh=dp4,tp2"],
    ),
    "few kv heads": (
        "tp8",
        {"model": {"num_heads": 8, "num_kv_heads": 4, "d_model": 32}},
        ["num_kv_heads=4", "=dp2,tp4"],
    ),
    "rows": ("dp5", {}, ["train.batch_size=24", "24 rows", "dp x fsdp x ep = 5", "--mesh=dp4"]),
    "rows by every axis": (
        "dp2,fsdp2,ep2",
        {"model": {"experts": {}}, "train": {"batch_size": 12}},
        ["train.batch_size=12", "12 rows", "dp x fsdp x ep = 8: use a multiple of 8 rows"],
    ),
    "layers": (
        "pp3,dp2",
        {},
        ["model.num_layers=2", "parallel.rounds = 3 x 1 stages: use a multiple of 3", "=pp2,dp3"],
    ),
    "layers by rounds": (
        "pp2",
        {"model": DEEP, "parallel": {"rounds": 3}},
        ["model.num_layers=4", "parallel.rounds = 2 x 3 stages: use a multiple of 6", "=dp2"],
    ),
    "layers by patterns": (
        "pp4",
        {"model": DEEP | LOCAL},
        ["model.num_layers=4", "= 4 x 1 stages of whole patterns of 2 layers", "8, or", "=pp2,dp2"],
    ),
    "sequence": (
        "cp8",
        {},
        ["model.max_seq_len=24", "2 x cp = 16 chunks: use a multiple of 16", "--mesh=dp2,cp4"],
    ),
    "experts": (
        "dp2,ep4",
        {"model": {"experts": {"num_experts": 6}}},
        ["num_experts=6 does not divide over ep=4: use a multiple of 4", "--mesh=dp4,ep2"],
    ),
    "ep without experts": (
        "dp2,ep2",
        {},
        ["ep=2 splits experts, but the model has none", "--mesh=dp4"],
    ),
    "fewer micro-batches than stages": (
        "pp4",
        {"model": DEEP, "train": {"accumulation": 8}},
        ["3 rows on each device", "than pp=4 has stages: use 2 times the train.batch_size"],
    ),
    "micro-batches that do not divide": (
        "pp2,dp2",
        {"parallel": {"microbatches": 5}},
        ["parallel.microbatches=5 is no divisor of 12 rows a device: use one of 2, 3, 4, 6, 12"],
    ),
    "too few micro-batches": (
        "pp2",
        {"parallel": {"microbatches": 1}},
        ["parallel.microbatches=1 is fewer than pp=2 stages: use one of 2, 3, 4, 6, 8, 12, 24"],
    ),
    "capacity": ("dp2,cp2", {"model": CP_CONFLICT}, ["experts.capacity", "cp=2", "--mesh=dp4"]),
    "attention dropout": (
        "cp2",
        {"model": {"attention_dropout": 0.1}},
        ["cp=2 splits rows", "model.attention_dropout=0.1 needs whole ones", "--mesh=dp2"],
    ),
    "attention": ("cp2", {"model": {"attention": "plain"}}, ["model.attention=plain", "=dp2"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_a_mesh_cannot_split_names_the_nearest_that_can(case):
    mesh, fields, fragments = MISFITS[case]
    config = tiny_config(**fields)
    with pytest.raises(UserError) as caught:
        check_fits(config, make_mesh(mesh))
    sentence = str(caught.value)
    assert [fragment for fragment in fragments if fragment not in sentence] == []
    check_fits(config, make_mesh(sentence.split("--mesh=")[1]))


FITS = {
    "layers": {"model": {"num_layers": 3}},
    "layers by rounds": {"model": {"num_layers": 6}, "parallel": {"rounds": 3}},
    "layers by patterns": {"model": {"num_layers": 8} | LOCAL},
    "sequence": {"model": {"max_seq_len": 32}},
    "experts": {"model": {"experts": {"num_experts": 4}}},
    "fewer micro-batches than stages": {
        "model": DEEP,
        "train": {"batch_size": 48, "accumulation": 8},
    },
    "micro-batches that do not divide": {"parallel": {"microbatches": 6}},
    "too few micro-batches": {"parallel": {"microbatches": 2}},
    "capacity": {"model": {"experts": {"num_experts": 8}}},
    "attention dropout": {"model": {"dropout": 0.1}},
}


@pytest.mark.parametrize("case", FITS)
def test_what_a_sentence_advises_fits(case):
    check_fits(tiny_config(**FITS[case]), make_mesh(MISFITS[case][0]))


@pytest.mark.parametrize("case", ["layers", "sequence", "capacity", "rows"])
def test_decoding_needs_less(case):
    mesh, fields, _ = MISFITS[case]
    check_fits(tiny_config(**fields), make_mesh(mesh), training=False)


@pytest.mark.parametrize("case", ["heads", "experts", "ep without experts"])
def test_decoding_too_needs_whole_heads_and_experts(case):
    mesh, fields, fragments = MISFITS[case]
    with pytest.raises(UserError) as caught:
        check_fits(tiny_config(**fields), make_mesh(mesh), training=False)
    assert fragments[0] in str(caught.value)


def test_micro_batches_have_to_be_split_too():
    config = tiny_config(train={"batch_size": 24, "accumulation": 6})
    check_fits(config, make_mesh("dp2,fsdp2,tp2"))
    with pytest.raises(UserError, match=r"accumulation=6 makes micro-batches of 4 rows.*= 8"):
        check_fits(config, make_mesh("dp8"))


def test_layers_are_stored_in_the_schedules_order_and_read_in_their_own():
    mesh = make_mesh("pp2")
    order = np.array([0, 2, 1, 3])
    axes = {"w": ("layers", "mlp"), "v": ("mlp",)}
    tree = {"w": np.arange(12.0).reshape(4, 3), "v": np.arange(4.0)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), tree)
    layout = make_layout(shapes, axes, mesh, order)
    assert layout.stacked == {"w": True, "v": False}
    placed = jax.tree.map(
        lambda x, s: jax.device_put(np.float32(x), s.sharding), tree, layout.exact
    )
    stored = layout.to_stored(placed)
    np.testing.assert_array_equal(stored["w"], tree["w"][order])
    np.testing.assert_array_equal(stored["v"], tree["v"])
    # The first device has the first layer of both rounds.
    np.testing.assert_array_equal(stored["w"].addressable_shards[0].data, tree["w"][[0, 2]])
    back = layout.to_exact(stored)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert make_layout(shapes, axes, mesh, np.arange(4)).order is None


def test_a_pipeline_splits_what_is_in_no_layer_too():
    spec = functools.partial(storage_spec, mesh=make_mesh("pp2,fsdp2,tp2"))
    assert spec((8, 12), ("vocab", "embed")) == P("tp", ("pp", "fsdp"))
    assert spec((8, 6), ("vocab", "embed")) == P("tp", "fsdp")
    assert spec((4, 12, 10), ("layers", "embed", "mlp")) == P("pp", "fsdp", "tp")
    assert spec((4, 12, 10), ("experts", "embed", "mlp")) == P("ep", ("pp", "fsdp"), "tp")
