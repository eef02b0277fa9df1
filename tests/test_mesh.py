"""The mesh's text, and meshes over real and virtual devices."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.axes import MESH_AXES, OPEN, format_mesh, parse_mesh
from jaxlm.decode_params import unfolded
from jaxlm.errors import UserError
from jaxlm.mesh import batch_shards, folded_mesh, make_mesh, nearest_meshes

SIZES = st.tuples(*[st.sampled_from([1, 1, 2, 3, 16])] * len(MESH_AXES)).map(
    lambda sizes: dict(zip(MESH_AXES, sizes, strict=True))
)


@given(sizes=SIZES, open_axis=st.none() | st.sampled_from(MESH_AXES))
def test_a_mesh_is_its_text(sizes, open_axis):
    if open_axis:
        sizes[open_axis] = OPEN
    assert parse_mesh(format_mesh(sizes)) == sizes


@given(sizes=SIZES, order=st.permutations(MESH_AXES), gap=st.sampled_from(["", " "]))
def test_axes_in_any_order_are_the_same_mesh(sizes, order, gap):
    text = f",{gap}".join(f"{axis}{sizes[axis]}" for axis in order)
    assert parse_mesh(text) == sizes
    assert tuple(parse_mesh(text)) == MESH_AXES


WRONG_TEXTS = {
    "": "'' is not an axis and its size",
    "4": "'4' is not an axis",
    "dp4,": "'' is not an axis",
    "fdsp4": "did you mean 'fsdp'",
    "dp-4": "'dp-4' is not an axis",
    "dp4tp2": "'dp4tp2' is not an axis",
    "dp4 tp2": "'dp4 tp2' is not an axis",
    "dp=4": "'dp=4' is not an axis",
    "DP4": "'DP4' is not an axis",
    "dp²": "'dp²' is not an axis",
    "dp2,dp4": "names axis 'dp' twice",
    "dp,dp": "names axis 'dp' twice",
    "tp0": "axis 'tp' has size 0",
    "dp,tp": "leaves dp and tp open, but only one axis",
}


@pytest.mark.parametrize("text", WRONG_TEXTS)
def test_a_wrong_text_is_one_sentence(text):
    with pytest.raises(UserError) as caught:
        parse_mesh(text)
    assert f"mesh={text!r}" in str(caught.value)
    assert WRONG_TEXTS[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@given(sizes=SIZES, devices=st.integers(1, 64))
def test_nearest_meshes_have_all_the_devices(sizes, devices):
    meshes = nearest_meshes(sizes, devices)
    assert 1 <= len(meshes) <= 3
    for text in meshes:
        assert math.prod(parse_mesh(text).values()) == devices
        assert format_mesh(parse_mesh(text)) == text


@given(sizes=SIZES)
def test_the_nearest_mesh_is_the_mesh_itself_where_it_fits(sizes):
    if math.prod(sizes.values()) <= 64:
        assert nearest_meshes(sizes, math.prod(sizes.values()))[0] == format_mesh(sizes)


def test_nearest_meshes_keep_to_the_named_axes_and_to_what_works():
    sizes = parse_mesh("dp3,tp2")
    assert nearest_meshes(sizes, 8, count=2) == ["dp4,tp2", "dp2,tp4"]
    assert nearest_meshes(sizes, 8, works=lambda sizes: sizes["tp"] == 1)[0] == "dp8"
    assert nearest_meshes(parse_mesh("tp8"), 8, works=lambda s: s["tp"] < 8)[0] == "dp2,tp4"
    assert nearest_meshes(sizes, 8, works=lambda sizes: False) == []
    assert nearest_meshes(sizes, 8, works=lambda sizes: set(sizes) == set(MESH_AXES))


@pytest.mark.parametrize("text", ["dp1", "tp2", "tp2,dp2", "fsdp2,dp2,tp2", "dp,tp3", "fsdp"])
def test_every_axis_exists_in_a_fixed_order(text):
    mesh = make_mesh(text)
    asked = parse_mesh(text)
    taken = math.prod(n for n in asked.values() if n != OPEN)
    assert mesh.axis_names == MESH_AXES
    for axis, size in asked.items():
        assert mesh.shape[axis] == (len(jax.devices()) // taken if size == OPEN else size)


def test_a_mesh_on_cpu_may_leave_devices_out():
    assert make_mesh("tp3").devices.ravel().tolist() == jax.devices()[:3]
    assert batch_shards(make_mesh("dp2,fsdp2,tp2")) == 4


FOLDS = ["pp2", "cp2,tp2", "pp2,cp2,tp2", "pp2,dp2,fsdp2", "fsdp2,ep2,cp2", "pp4,ep2", "dp2,tp2"]
SPECS = [
    P("fsdp", "tp"),
    P(("dp", "fsdp", "ep"), None),
    P(("tp", "fsdp"), "ep"),
    P(None, ("fsdp",)),
    P("ep", "dp"),
    P(),
]


@pytest.mark.parametrize("text", FOLDS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_folded_mesh_leaves_every_part_on_its_device(text, spec):
    mesh = make_mesh(text)
    folded = folded_mesh(mesh)
    parts = NamedSharding(folded, spec).devices_indices_map((16, 16))
    assert parts == NamedSharding(mesh, unfolded(spec)).devices_indices_map((16, 16))


@pytest.mark.parametrize("text", FOLDS)
def test_a_folded_mesh_has_pipeline_and_ring_in_fsdp(text):
    mesh = make_mesh(text)
    folded = folded_mesh(mesh)
    sizes = dict(mesh.shape)
    fsdp = sizes["pp"] * sizes["fsdp"] * sizes["cp"]
    assert dict(folded.shape) == sizes | {"pp": 1, "cp": 1, "fsdp": fsdp}
    assert set(folded.devices.flat) == set(mesh.devices.flat)
    assert (folded is mesh) == (text == "dp2,tp2")


def test_too_few_devices_already_started():
    with pytest.raises(UserError, match=r"'dp16' needs 16 devices.*with 8: .*_DEVICES=16"):
        make_mesh("dp16")


@dataclasses.dataclass(frozen=True)
class Device:
    """What `make_mesh` looks at in a GPU."""

    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has eight GPUs."""
    devices = [Device(i) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, devices, **__: (shape, devices))
    return devices


MISMATCHES = {
    "dp3,tp2": "dp 3 x tp 2 = 6, but there are 8 devices (NVIDIA H100); use --mesh=dp4,tp2 or ",
    "dp16": "dp 16 = 16, but there are 8 devices",
    "dp,tp3": "tp 3 = 3, but there are 8 devices",
    "dp1": "dp 1 = 1, but there are 8 devices (NVIDIA H100); use --mesh=dp8 or ",
}


@pytest.mark.parametrize("text", MISMATCHES)
def test_a_mesh_that_gpus_do_not_fill_names_those_they_do(text, gpus):
    with pytest.raises(UserError) as caught:
        make_mesh(text)
    sentence = str(caught.value)
    assert f"mesh={text!r} does not match" in sentence
    assert MISMATCHES[text] in sentence
    suggested = [word.strip(";,") for word in sentence.split() if word.startswith("--mesh=")]
    assert suggested
    for option in suggested:
        make_mesh(option.removeprefix("--mesh="))


def test_gpus_fill_the_open_axis(gpus):
    report = []
    assert make_mesh("dp,tp2", report.append) == ((1, 4, 1, 1, 1, 2), gpus)
    assert report == []


def test_a_mesh_larger_than_the_machine_gets_virtual_devices():
    code = (
        "from jaxlm.mesh import make_mesh\n"
        "print(make_mesh('dp3,tp4', lambda line: print('told:', line)).size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, size = done.stdout.splitlines()
    assert told.startswith("told: mesh dp3,tp4: 12 virtual CPU devices on ")
    assert size == "12"


def test_more_virtual_devices_than_can_be_is_an_error():
    with pytest.raises(UserError, match="needs 99999 devices, but this machine has only CPUs"):
        make_mesh("dp99999")


def test_a_platform_that_is_not_there_is_one_sentence():
    program = "from jaxlm.train import *; run_command(main)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: JAX cannot start on JAX_PLATFORMS='nowhere'")
    assert result.stderr.count("\n") == 1
