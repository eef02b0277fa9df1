"""`python -m jaxlm.check`: agreement, what breaks it, what is asked of it."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny import task_of

from jaxlm import check, parity
from jaxlm.cli import build_config
from jaxlm.errors import UserError
from jaxlm.mesh import make_mesh
from jaxlm.parallel import ring
from jaxlm.presets import PRESETS

SMALL = {
    "model.vocab_size": 61,
    "model.max_seq_len": 16,
    "model.d_model": 16,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.d_ff": 24,
    "optim.name": "sgd",
    "optim.learning_rate": 0.5,
}


@pytest.fixture(scope="module", autouse=True)
def one_reference():
    """One device's steps are taken once for tests of the same model."""
    known, measure = {}, check.measure

    def remembered(config, mesh, name, *args, **options):
        if name != "dp1":
            return measure(config, mesh, name, *args, **options)
        key = config.model, config.train, config.optim
        if key not in known:
            known[key] = measure(config, mesh, name, *args, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "measure", remembered)
        yield


def arguments(meshes: str, *options: str, **changes) -> list[str]:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    settings = [f"--{key}={value}" for key, value in (SMALL | changes).items()]
    return [*settings, f"--meshes={meshes}", *options]


def checked(capsys, *args, **changes) -> tuple[int, dict, str]:
    """Exit code, the JSON on standard output, and standard error."""
    code = check.main(arguments(*args, "--json", **changes))
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.mark.slow
def test_meshes_agree_and_the_table_says_so(capsys):
    code = check.main(arguments("fsdp2;pp2,cp2", "--rows=8", "--collectives"))
    out, err = capsys.readouterr()
    assert code == 0
    table, *audits = out.split("\n\n")
    head, one, *rows = table.splitlines()
    assert head.split()[:3] == ["mesh", "parameters", "batch"]
    assert one.startswith("dp1 ") and one.endswith("one device")
    assert [row.split()[0] for row in rows] == ["fsdp2", "pp2,cp2"]
    assert all(row.endswith("same") for row in rows)
    assert len({tuple(row.split()[1:3]) for row in [one, *rows]}) == 1
    assert [a.splitlines()[0].split(":")[0] for a in audits] == ["fsdp2", "pp2,cp2"]
    assert "collective-permute" in audits[1]
    assert "8 rows" in err and "compiled" in err


@pytest.mark.slow
def test_json_has_the_numbers(capsys):
    experts = {"model__experts__num_experts": 4, "model__num_layers": 1, "model__dropout": 0.1}
    code, found, err = checked(capsys, "ep2,tp2", optim__name="adamw", **experts)
    assert "batches of 2 rows, the fewest" in err
    assert code == 0 and found["agrees"]
    (row,), one = found["meshes"], found["reference"]
    assert row["parameters"] == one["parameters"] and row["batch"] == one["batch"]
    assert row["devices"] == 4 and one["devices"] == 1
    assert 0 <= row["gradient_difference"] <= found["tolerance"] == 1e-5
    assert row["gradient_parameter"].endswith(("kernel", "scale", "embedding"))
    assert len(row["losses"]) == 3 and row["losses"][0] == pytest.approx(math.log(61), rel=0.2)
    assert len(set(one["losses"])) == 3
    assert row["failures"] == [] and row["first_tensor"] is None


@pytest.mark.slow
def test_a_reduction_that_forgets_parts_is_found(capsys, monkeypatch):
    """The gradients of keys and values leave out what the other devices of the ring add."""
    monkeypatch.setattr(ring, "_add", lambda tree, other: tree)
    code, found, err = checked(capsys, "cp2", "--rows=8")
    (broken,) = found["meshes"]
    assert code == 1 and not found["agrees"]
    assert "attention" in broken["first_tensor"] or "embed" in broken["first_tensor"]
    assert broken["gradient_difference"] > 1e-3
    assert broken["loss_differences"][0] <= 1e-5, "the forward pass is sound"
    assert f"cp2 is not as one device: gradient of {broken['first_tensor']} differs by" in err


def test_a_broken_sharding_rule_is_found(capsys, monkeypatch):
    """Layers stored in another order than the pipeline's rounds ask for."""
    from jaxlm.parallel.pipeline import Schedule

    monkeypatch.setattr(Schedule, "order", lambda self, layers: np.arange(layers))
    code, found, err = checked(capsys, "pp2", "--rows=8", parallel__rounds=2)
    assert code == 1
    assert found["meshes"][0]["first_tensor"] in err


@pytest.fixture(scope="module")
def small():
    config = build_config({})
    model = dataclasses.replace(config.model, d_model=16, num_layers=1, vocab_size=61)
    model = dataclasses.replace(model, d_ff=16, max_seq_len=8, num_heads=2, num_kv_heads=2)
    optim = dataclasses.replace(config.optim, name="sgd")
    config = dataclasses.replace(config, model=model, optim=optim)
    return parity.measure(config, make_mesh("dp2"), "dp2")


def changed(run, **fields):
    return parity.compare(dataclasses.replace(run, **fields), run)


def test_a_run_agrees_with_itself(small):
    row = parity.compare(small, small)
    assert (row.failures, row.gradient_difference, row.loss_differences) == ([], 0, [0, 0, 0])


def test_each_difference_is_named(small):
    name = "layers/mlp/up/kernel"
    row = changed(small, parameters=small.parameters | {name: "other"})
    assert (row.failures, row.first_tensor) == ([f"initial parameter {name} differs"], name)
    row = changed(small, batch=small.batch | {"tokens": "other"})
    assert row.failures == ["tokens of the batch differs"]
    row = changed(small, torn=name)
    assert row.failures == [f"two devices hold different copies of {name}"]
    row = changed(small, losses=[small.losses[0], small.losses[1] * 1.001, small.losses[2]])
    assert row.failures == ["loss of step 2 differs by 1.0e-03 (bound 0.0001)"]


@pytest.mark.parametrize("wrong", [3.0, math.nan])
def test_a_gradient_is_judged_by_its_norm(small, wrong):
    name = "layers/mlp/up/kernel"
    gradient = small.gradients[name].copy()
    gradient.flat[0] += wrong
    row = changed(small, gradients=small.gradients | {name: gradient})
    assert (row.first_tensor, row.gradient_parameter, len(row.failures)) == (name, name, 1)


def test_copies_that_differ_are_found():
    mesh = make_mesh("dp2")
    everywhere = jax.NamedSharding(mesh, jax.P())
    copies = [jax.device_put(np.float32([0, i]), d) for i, d in enumerate(mesh.devices.flat)]
    torn = jax.make_array_from_single_device_arrays((2,), everywhere, copies)
    sound = jax.device_put(np.float32([0, 1]), everywhere)
    assert parity._torn({"a": sound, "b": torn}) == ["b"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if "70b" not in name])
def test_shrinking_keeps_what_meshes_divide(preset):
    fields = {"preset": preset, "vocab_size": 50_000}
    model = build_config({"task": task_of(preset), "model": fields}).model
    small = check.shrink(model, 32)
    assert small.d_model == 32 and small.vocab_size == check.SHRUNK_VOCABULARY
    assert small.head_size * small.num_heads <= 2 * 32 or small.head_size == 2
    for field in ("num_layers", "num_heads", "kv_heads", "max_seq_len", "layer_pattern"):
        assert getattr(small, field) == getattr(model, field)
    if model.experts is not None:
        assert small.experts.num_experts == model.experts.num_experts


MISTAKES = [
    (["--meshes=dp2;tp3"], r"^tp3: model.num_heads=4 does not divide over tp=3"),
    (["--meshes=dp2;;tp2"], "empty mesh"),
    (["--meshes=dq2"], "'dq2' is not an axis"),
    (["--meshes=ep2"], "the model has none"),
    (["--meshes=dp2", "--rows=3"], "^dp2: train.batch_size=3"),
    (["--meshes=dp2", "--rows=none"], "--rows='none' is not a number"),
    (["--meshes=dp2", "--width=16"], "--width=16 does not shrink model.d_model=16"),
    (["--meshs=dp2"], "did you mean '--meshes'"),
]


@pytest.mark.parametrize(("options", "sentence"), MISTAKES, ids=lambda x: str(x)[:30])
def test_mistakes_are_one_sentence_before_anything_is_computed(options, sentence, monkeypatch):
    monkeypatch.setattr(check, "measure", None)
    settings = [a for a in arguments("") if not a.startswith(("--meshes", "--train"))]
    with pytest.raises(UserError, match=sentence):
        check.main([*settings, *options])


def test_without_meshes_those_that_fit_are_taken():
    config = build_config({"model": {"vocab_size": 300}})
    names = check._meshes(None, config)
    assert {"dp8", "fsdp8", "dp2,fsdp2,tp2", "pp2,dp2,tp2", "dp2,cp4"} == set(names)
    config = dataclasses.replace(config, mesh="dp2,tp2")
    assert list(check._meshes(None, config)) == ["dp2,tp2"]
