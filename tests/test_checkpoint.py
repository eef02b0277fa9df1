import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxlm import checkpoint
from jaxlm.checkpoint import (
    Checkpoints,
    complete_steps,
    latest_sound,
    restore_params,
    restore_state,
    step_folder,
    verify,
)
from jaxlm.errors import UserError


class FileTokenizer:
    """The part of a tokenizer that a checkpoint needs."""

    def save(self, folder):
        (Path(folder) / "tokenizer.model").write_bytes(b"pieces")


class HeldTokenizer(FileTokenizer):
    """Keeps a save from finishing until `released`."""

    def __init__(self):
        self.released = threading.Event()

    def save(self, folder):
        assert self.released.wait(30)
        super().save(folder)


def open_run(run, keep=3, keep_best=False):
    return Checkpoints(run, keep=keep, keep_best=keep_best)


def write(checkpoints, step, state=None, tokenizer=None, **metrics):
    checkpoints.save(
        step,
        {"w": jnp.full((64, 32), step, jnp.float32)} if state is None else state,
        config_text="seed: 1\n",
        tokenizer=tokenizer or FileTokenizer(),
        metrics=metrics,
    )


def save_steps(run, *steps):
    with open_run(run, keep=len(steps)) as checkpoints:
        for step in steps:
            write(checkpoints, step)


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, one), two in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        one, two = np.asarray(one), np.asarray(two)
        assert (one.dtype, one.shape) == (two.dtype, two.shape), path
        assert one.tobytes() == two.tobytes(), path


def train_state():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jax.random.normal(keys[0], (24, 16)),
        "layers": {"q": jax.random.normal(keys[1], (4, 16, 8)).astype(jnp.bfloat16)},
        "odd": jax.random.normal(keys[2], (7, 3)),
    }
    return {
        "step": jnp.asarray(7, jnp.int32),
        "seed": jnp.asarray([0, 4294967295], jnp.uint32),
        "special": jnp.asarray([jnp.nan, -jnp.inf, -0.0], jnp.float16),
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "ema": None,
        "frozen": {},
        "pair": (jnp.ones((), bool), [jnp.arange(5, dtype=jnp.int8)]),
    }


def mesh_of(*sizes):
    names = ("a", "b")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


# Round trips


def test_every_leaf_and_container_comes_back_bit_for_bit(tmp_path):
    state = train_state()
    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 7, state, tokens=1234, valid_loss=2.5)
    folder = step_folder(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    assert_same_bits(restore_state(folder, abstract(state)), state)
    assert (folder / "config.yaml").read_text() == "seed: 1\n"
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((folder / "metrics.json").read_text()) == {
        "step": 7,
        "tokens": 1234,
        "valid_loss": 2.5,
    }


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (((4, 2), P("a", "b")), ((2, 4), P("b", "a"))),
        (((8,), P("a")), ((2, 4), P(None, ("a", "b")))),
        (((8,), P()), ((8,), P("a"))),
        (((2, 4), P("b")), None),
        (None, ((4, 2), P("a", "b"))),
    ],
)
def test_any_sharding_is_restored_onto_any_other(tmp_path, saved, wanted):
    def sharding(layout):
        if layout is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(mesh_of(*layout[0]), layout[1])

    value = jax.random.normal(jax.random.key(1), (16, 24))
    state = {"w": jax.device_put(value, sharding(saved))}
    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 1, state)
    target = abstract(state, None if wanted is None else sharding(wanted))
    restored = restore_state(step_folder(tmp_path, 1), target)
    assert restored["w"].sharding == sharding(wanted)
    assert_same_bits(restored, {"w": value})


def test_params_alone_are_restored_without_reading_the_rest(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    state = {
        "params": params,
        "params_of_another": {"w": jnp.zeros(3)},
        "opt_state": jax.random.normal(jax.random.key(1), (1024, 1024)),
    }
    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 1, state)

    def bytes_read():
        metrics = tensorstore.experimental_collect_matching_metrics(
            "/tensorstore/kvstore/file/bytes_read"
        )
        return sum(value["value"] for metric in metrics for value in metric["values"])

    before = bytes_read()
    assert_same_bits(restore_params(step_folder(tmp_path, 1), abstract(params)), params)
    assert 256 <= bytes_read() - before < 65536
    other = restore_params(
        step_folder(tmp_path, 1), abstract({"w": jnp.zeros(3)}), key="params_of_another"
    )
    assert_same_bits(other, {"w": jnp.zeros(3)})
    assert restore_params(step_folder(tmp_path, 1), {"none": None}, key="ema") == {"none": None}


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"a": {"w": jnp.ones((4, 3))}, "b": jnp.ones(2)}, r"a/w has shape \(4, 2\) .*\(4, 3\) is"),
        ({"a": {"w": jnp.ones((3, 2))}, "b": jnp.ones(2)}, r"a/w has shape \(4, 2\) .*\(3, 2\) is"),
        (
            {"a": {"w": jnp.ones((4, 2), jnp.bfloat16)}, "b": jnp.ones(2)},
            "a/w has dtype float32 .* but bfloat16 is asked for",
        ),
        ({"a": {"v": jnp.ones((4, 2))}, "b": jnp.ones(2)}, "has no a/v, which is asked for"),
        ({"a": {"w": jnp.ones((4, 2))}}, "has b, for which there is no place"),
        ({"a": {"w": jnp.ones((4, 2))}, "b": None}, "has b, for which there is no place"),
    ],
)
def test_a_tree_that_differs_is_refused_naming_the_first_difference(tmp_path, wanted, sentence):
    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 1, {"a": {"w": jnp.ones((4, 2))}, "b": jnp.ones(2)})
    with pytest.raises(UserError, match=sentence):
        restore_state(step_folder(tmp_path, 1), abstract(wanted))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: name a folder such as"):
        restore_params(tmp_path, abstract({"w": jnp.ones(2)}))


# Saving in the background


def test_save_returns_before_the_checkpoint_is_written(tmp_path):
    first, second = HeldTokenizer(), HeldTokenizer()
    second.released.set()
    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 1, tokenizer=first)
        assert not first.released.is_set()
        assert complete_steps(tmp_path) == []
        threading.Timer(0.2, first.released.set).start()
        write(checkpoints, 2, tokenizer=second)
        assert complete_steps(tmp_path)[:1] == [1], "a save waits for the one before it"
        checkpoints.wait()
        assert complete_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("spec", [None, P("a"), P()])
def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, spec):
    device = SingleDeviceSharding(jax.devices()[0])
    sharding = device if spec is None else NamedSharding(mesh_of(8), spec)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1, tree), donate_argnums=0)
    state = {
        str(i): jax.device_put(jax.random.normal(jax.random.key(i), (1024, 512)), sharding)
        for i in range(4)
    }
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    jax.block_until_ready(overwrite(jax.tree.map(jnp.copy, state)))
    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 1, state)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    assert_same_bits(restore_state(step_folder(tmp_path, 1), abstract(state)), expected)


def test_an_error_in_the_background_surfaces_once_and_leaves_no_folder(tmp_path):
    class BrokenTokenizer:
        def save(self, folder):
            raise PermissionError(13, "Permission denied", str(folder))

    with open_run(tmp_path) as checkpoints:
        write(checkpoints, 1)
        write(checkpoints, 2, tokenizer=BrokenTokenizer())
        with pytest.raises(
            UserError, match=r"step_00000002 could not be .*step_00000001 is intact.*Permission"
        ):
            write(checkpoints, 3)
        assert not step_folder(tmp_path, 2).exists()
        write(checkpoints, 4)
    assert complete_steps(tmp_path) == [1, 4]


def test_a_sound_step_is_kept_and_a_damaged_one_written_again(tmp_path):
    save_steps(tmp_path, 1, 2)
    damage_metrics(step_folder(tmp_path, 2))
    with open_run(tmp_path) as checkpoints:
        for step in (1, 2):
            write(checkpoints, step, {"w": jnp.zeros(3)})
    target = abstract({"w": jnp.zeros(3)})
    with pytest.raises(UserError, match=r"\(64, 32\)"):
        restore_state(step_folder(tmp_path, 1), target)
    assert_same_bits(restore_state(step_folder(tmp_path, 2), target), {"w": jnp.zeros(3)})
    assert verify(step_folder(tmp_path, 2)) is None


# Damage


def largest_file(folder):
    return max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def truncate(folder):
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size - 12)


def flip_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete_file(folder):
    largest_file(folder).unlink()


def damage_metrics(folder):
    (folder / "metrics.json").write_text('{"step": 2 }')


def garble_manifest(folder):
    (folder / "manifest.json").write_text('{"files": 1}')


def delete_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "state", "phrase"),
    [
        (truncate, "damaged", r"state/\S+ has \d+ bytes instead of \d+"),
        (flip_bit, "damaged", r"bytes changed in state/\S+"),
        (delete_file, "damaged", r"state/\S+ is missing"),
        (damage_metrics, "damaged", r"metrics.json has 12 bytes instead of 14"),
        (garble_manifest, "damaged", "manifest.json is unreadable"),
        (delete_manifest, "unfinished", "no manifest"),
    ],
)
def test_damage_is_found_reported_and_the_step_before_used(tmp_path, damage, state, phrase):
    save_steps(tmp_path, 1, 2)
    lines = []
    assert latest_sound(tmp_path, lines.append) == 2
    damage(step_folder(tmp_path, 2))
    assert lines == []
    assert latest_sound(tmp_path, lines.append) == 1
    (line,) = lines
    pattern = rf"checkpoint step_00000002 is {state} \({phrase}\); using step_00000001"
    assert re.fullmatch(pattern, line), line


def test_orbax_alone_restores_a_flipped_bit_in_silence(tmp_path):
    """Why there are checksums; should this ever fail, they may be had for less."""
    save_steps(tmp_path, 1)
    flip_bit(step_folder(tmp_path, 1))
    target = abstract({"w": jnp.ones((64, 32))})
    restored = restore_state(step_folder(tmp_path, 1), target)
    assert (np.asarray(restored["w"]) != 1).sum() == 1


def test_nothing_sound_is_an_error_but_nothing_complete_is_a_fresh_start(tmp_path):
    lines = []
    assert latest_sound(tmp_path, lines.append) is None
    assert lines == []
    save_steps(tmp_path, 1, 2)
    flip_bit(step_folder(tmp_path, 1))
    truncate(step_folder(tmp_path, 2))
    with pytest.raises(UserError, match=r"no checkpoint in \S+ is sound \(step_00000002: state/"):
        latest_sound(tmp_path, lines.append)
    for step in (1, 2):
        delete_manifest(step_folder(tmp_path, step))
    assert latest_sound(tmp_path, lines.append) is None
    assert len(lines) == 2
    assert all("is unfinished (no manifest); no checkpoint precedes it" in line for line in lines)


# Retention


def test_the_newest_are_kept_and_the_best(tmp_path):
    losses = {1: 3.0, 2: float("nan"), 3: 1.5, 4: 2.0, 5: None, 6: 1.75}
    with open_run(tmp_path, keep=2, keep_best=True) as checkpoints:
        for step, loss in losses.items():
            write(checkpoints, step, **({} if loss is None else {"valid_loss": loss}))
    assert complete_steps(tmp_path) == [3, 5, 6]
    with open_run(tmp_path, keep=1, keep_best=False) as checkpoints:
        write(checkpoints, 7)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000007"]


def test_without_any_loss_there_is_no_best(tmp_path):
    with open_run(tmp_path, keep=1, keep_best=True) as checkpoints:
        for step in (1, 2, 3):
            write(checkpoints, step)
    assert complete_steps(tmp_path) == [3]


def test_pruning_waits_for_the_new_and_spares_what_is_later(tmp_path):
    save_steps(tmp_path, 1, 9)
    tokenizer = HeldTokenizer()
    with open_run(tmp_path, keep=1) as checkpoints:
        write(checkpoints, 2, tokenizer=tokenizer)
        assert complete_steps(tmp_path) == [1, 9]
        tokenizer.released.set()
    assert complete_steps(tmp_path) == [2, 9]


def test_a_deletion_cut_short_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)

    def half_rmtree(folder, ignore_errors):
        if Path(folder).exists():
            delete_file(Path(folder))

    with open_run(tmp_path, keep=1) as checkpoints, monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", half_rmtree)
        write(checkpoints, 3)
        checkpoints.wait()
    lines = []
    assert latest_sound(tmp_path, lines.append) == 3
    delete_manifest(step_folder(tmp_path, 3))
    assert latest_sound(tmp_path, lines.append) is None
    assert len(lines) == 1, "steps 1 and 2 are gone for good, not damaged"
    save_steps(tmp_path, 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


# Disaster

CHILD = """
import itertools, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import *
run = sys.argv[1]
"""


def start_child(program, *arguments):
    code = CHILD.format(tests=str(Path(__file__).parent)) + program
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FILL_DISK = """
with open_run(run) as checkpoints:
    write(checkpoints, 100)
    many = {str(n): jax.random.normal(jax.random.key(0), (256, 256)) for n in range(24)}
    for _ in range(3):
        write(checkpoints, 200, many)
        try:
            checkpoints.wait()
        except UserError as error:
            print(error)
    print(sorted(path.name for path in Path(run, "checkpoints").iterdir()))
    write(checkpoints, 300)
print(latest_sound(run, print))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_survives(small_disk):
    run = small_disk / "run"
    output, errors = start_child(FILL_DISK, run).communicate(timeout=120)
    assert output.splitlines() == [
        *[
            f"{run}/checkpoints has no space left for checkpoint step_00000200 "
            "(step_00000100 is intact): free some, or lower checkpoint.keep, and resume"
        ]
        * 3,
        "['step_00000100']",
        "300",
    ]
    assert errors == ""


SAVE_LOOP = """
start = latest_sound(run, print) or 0
with open_run(run, keep=2, keep_best=True) as checkpoints:
    for step in itertools.count(start + 1):
        state = {"w": jnp.full((256, 256), step), "step": jnp.asarray(step)}
        write(checkpoints, step, state, valid_loss=float(step % 7))
        if step == start + 2:
            print("saving", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_newest_sound_checkpoint_is_whole(tmp_path):
    chance = random.Random(0)
    target = abstract({"w": jnp.zeros((256, 256), int), "step": jnp.asarray(0)})
    reached = 0
    for _ in range(5):
        child = start_child(SAVE_LOOP, tmp_path)
        while "saving" not in (line := child.stdout.readline()):
            assert line, child.stderr.read()
            assert "damaged" not in line
        time.sleep(chance.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        lines = []
        step = latest_sound(tmp_path, lines.append)
        assert step > reached
        assert all("is unfinished (no manifest)" in line for line in lines), lines
        state = restore_state(step_folder(tmp_path, step), target)
        assert int(state["step"]) == step
        assert bool((state["w"] == step).all())
        reached = step
