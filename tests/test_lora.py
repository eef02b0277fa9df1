"""Adapters: what trains, what is saved, what is loaded, and what becomes of them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import exact, make_program, random_batch, tiny_config

import jaxlm
from jaxlm import train
from jaxlm.base import find_base
from jaxlm.checkpoint import Checkpoints, step_folder
from jaxlm.cli import dump_config, read_config
from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.loading import find_model, load_params, read_model, start_params
from jaxlm.mesh import make_mesh
from jaxlm.models import lora
from jaxlm.models.build import make_model
from jaxlm.nn.attention import Places
from jaxlm.sharding import path_name, split_boxes
from jaxlm.tokenizer import load_tokenizer

LORA = {"rank": 4, "alpha": 8.0}
LORA_RUN = {
    "lora.rank": 4,
    "train.steps": 4,
    "optim.learning_rate": 0.05,
    "checkpoint.every_steps": 2,
}


def adapted_config(optim=(), **lora):
    return tiny_config(init_from="base", lora=LORA | lora, optim={"name": "adamw"} | dict(optim))


def leaves(tree) -> dict[str, np.ndarray]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def adapted():
    return make_program(adapted_config())


@pytest.fixture(scope="module")
def steps(adapted):
    """The state at the start, and after three updates, with their losses."""
    state = adapted.init()
    states, losses = [exact(adapted, state)], []
    for i in range(3):
        state, metrics = adapted.train_step(state, adapted.put(random_batch(adapted_config(), i)))
        losses.append(float(metrics["loss"]))
    return [*states, exact(adapted, state)], losses


def test_at_the_start_it_is_the_base_bit_for_bit(adapted, steps):
    (start, _), losses = steps
    config = tiny_config(optim={"name": "adamw"})
    base = make_program(config)
    state = base.init()
    assert_same(exact(base, state).params, start.frozen)
    assert_same(jax.device_get(adapted.eval_params(adapted.init())), start.frozen)
    _, metrics = base.train_step(state, base.put(random_batch(config, 0)))
    assert float(metrics["loss"]) == losses[0]


def test_adapters_alone_move_and_alone_have_an_optimiser_state(steps):
    (start, end), _ = steps
    assert_same(start.frozen, end.frozen)
    moved = leaves(end.params)
    assert {name.rpartition("/")[2] for name in moved} == {"lora_a", "lora_b"}
    assert len(moved) == 14
    for name, before in leaves(start.params).items():
        assert not np.array_equal(before, moved[name]), name
    assert not any("kernel" in name for name in leaves(end.opt_state))
    assert size(end.opt_state) < 2.1 * size(end.params)


def test_adapters_are_drawn_as_the_paper_does(steps):
    (start, _), _ = steps
    drawn = leaves(start.params)
    assert all(not x.any() for name, x in drawn.items() if name.endswith("lora_b"))
    q, down = (drawn[f"layers/{name}/lora_a"] for name in ("attention/q", "mlp/down"))
    assert (q.shape, down.shape) == ((2, 48, 4), (2, 70, 4))
    assert q.std() == pytest.approx(48**-0.5, rel=0.2)
    assert down.std() == pytest.approx(70**-0.5, rel=0.2)
    assert not np.array_equal(q[0], q[1])
    assert not np.array_equal(q, drawn["layers/attention/k/lora_a"])


def test_merged_it_computes_what_it_did_with_adapters_beside(steps):
    (_, end), _ = steps
    config = adapted_config()
    model, tokens = make_model(config.model), jnp.arange(24)[None]
    whole = lora.attach(config.lora, end.frozen, end.params)
    merged = lora.merge(config.lora, end.frozen, end.params)

    def logits(params):
        hidden, *_ = model.hidden(params, tokens, Places(tokens))
        return np.asarray(model.logits(params, hidden))

    beside, inside, before = logits(whole), logits(merged), logits(end.frozen)
    np.testing.assert_allclose(inside, beside, atol=2e-5 * np.abs(beside).max())
    assert np.abs(beside - before).max() > 0.01
    kernel = end.frozen["layers"]["mlp"]["up"]["kernel"][1].astype(np.float64)
    a, b = (
        end.params["layers"]["mlp"]["up"][x][1].astype(np.float64) for x in ("lora_a", "lora_b")
    )
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["up"]["kernel"][1], kernel + 8.0 / 4 * a @ b, atol=1e-6
    )


MESHES = ["fsdp4,tp2"]
MORE = "dp8", "tp3", "pp2,dp2,tp2", "cp2,fsdp2"
MESHES += [pytest.param(m, marks=pytest.mark.slow) for m in MORE]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.slow
def test_the_same_numbers_on_any_mesh(mesh, steps):
    (start, _), losses = steps
    program = make_program(adapted_config(), mesh)
    state = program.init()
    assert_same(exact(program, state).params, start.params)
    for i, loss in enumerate(losses):
        state, metrics = program.train_step(state, program.put(random_batch(adapted_config(), i)))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert_same(exact(program, state).frozen, start.frozen)


def test_targets_are_what_gets_adapters():
    config = adapted_config(targets=["q", "v"])
    boxed = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    adapters, _ = split_boxes(
        jax.eval_shape(lambda: lora.init_adapters(config.lora, boxed, jax.random.key(0)))
    )
    assert {name.rpartition("/")[0] for name in leaves(adapters)} == {
        "layers/attention/q",
        "layers/attention/v",
    }
    wrong = adapted_config(targets=["q", "query"])
    with pytest.raises(UserError, match=r"'query', but .* down, gate, k, out, q, up, v"):
        make_program(wrong)
    with pytest.raises(UserError, match="set init_from"):
        tiny_config(lora=LORA)


@pytest.mark.slow
def test_a_mixture_of_experts_keeps_router_and_balance_as_they_are():
    experts = {"num_experts": 4, "top_k": 2, "d_ff": 8, "bias_rate": 0.1}
    config = tiny_config(init_from="base", lora=LORA, model={"experts": experts})
    program = make_program(config)
    state = program.init()
    names = leaves(state.params)
    assert names and all(name.startswith("layers/attention/") for name in names)
    before = exact(program, state).frozen
    state, metrics = program.train_step(state, program.put(random_batch(config, 0)))
    assert np.isfinite(metrics["loss"])
    assert_same(exact(program, state).frozen, before)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
@pytest.mark.slow
def test_other_optimisers_take_adapters(name):
    config = adapted_config(optim={"name": name, "weight_decay": 0.1})
    program = make_program(config)
    state, first = program.train_step(program.init(), program.put(random_batch(config, 0)))
    for _ in range(3):
        state, metrics = program.train_step(state, program.put(random_batch(config, 0)))
    assert float(metrics["loss"]) < float(first["loss"])


# -- as a run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(trained_run, tmp_path_factory):
    """A copy of the shared run, to be moved and damaged."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(trained_run, folder)
    return folder


@pytest.fixture(scope="module")
def build(base, corpus, tmp_path_factory):
    """The command line of a LoRA run from `base`, in a folder beside it."""
    cache = tmp_path_factory.getbasetemp() / "small_run_cache"

    def build(out, **changes):
        quiet = {"train.eval_every": 0, "train.sample_prompt": ""}
        places = {"data.train": corpus, "data.cache": cache, "data.workers": 1}
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        settings = quiet | places | LORA_RUN | {"init_from": base, "out": base.parent / out}
        return [f"--{key}={value}" for key, value in (settings | changes).items()]

    return build


@pytest.fixture(scope="module")
def lora_run(build, base):
    assert train.main(build("lora")) == 0
    return base.parent / "lora"


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_and_where_the_base_is(lora_run, base):
    folder = find_model(lora_run)
    noted = json.loads((folder / "base.json").read_text())
    assert noted["path"] == str(find_model(base).resolve())
    assert "base.json" in json.loads((folder / "manifest.json").read_text())["files"]
    held = lambda run: sum(np.size(leaf) for leaf in jax.tree.leaves(arrays(run)))  # noqa: E731
    assert held(lora_run) < held(base) / 3
    assert "lora" not in json.dumps(str(jaxlm.load(lora_run).config.model))


def arrays(run) -> dict[str, np.ndarray]:
    """The last checkpoint's arrays by name."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(find_model(run) / "state")


@pytest.mark.slow
def test_continued_it_is_the_run_that_was_not_stopped(lora_run, build):
    run = lora_run.with_name("continued")
    shutil.copytree(lora_run, run)
    shutil.rmtree(step_folder(run, 4))
    assert train.main(build("continued")) == 0
    ours, theirs = arrays(run), arrays(lora_run)
    assert any("lora_a" in name for name in ours) and any("mu" in name for name in ours)
    assert not any("kernel" in name for name in ours)
    assert_same(ours, theirs)


def test_loaded_it_is_merged_and_can_be_started_from(lora_run, base):
    model = jaxlm.load(lora_run)
    before, after = (jaxlm.score(m, "abc de").logprob for m in (base, model))
    assert before != after
    assert jaxlm.generate(model, "ab", max_new_tokens=4, temperature=0)
    mesh = make_mesh("dp1")
    decoder = make_model(model.config.model)
    merged = load_params(lora_run, decoder, mesh)
    assert_same(start_params(lora_run, decoder, mesh, seed=0), merged)
    trained = restored_adapters(lora_run)
    kernel = load_params(base, decoder, mesh)["layers"]["mlp"]["up"]["kernel"][1]
    change = 32.0 / 4 * trained["lora_a"][1] @ trained["lora_b"][1]
    np.testing.assert_allclose(merged["layers"]["mlp"]["up"]["kernel"][1], kernel + change, 1e-5)


def restored_adapters(run):
    found = arrays(run)
    return {x: np.asarray(found[f"params/layers/mlp/up/{x}"]) for x in ("lora_a", "lora_b")}


@pytest.mark.slow
def test_exported_it_is_the_merged_model(lora_run, tmp_path):
    pytest.importorskip("transformers")
    report = jaxlm.export_checkpoint(lora_run, to="hf", out=tmp_path / "hf")
    assert report.verified
    assert_same(read_model(tmp_path / "hf").params, read_model(find_model(lora_run)).params)
    # As the base of other adapters it is known by its weights.
    before = find_base(tmp_path / "hf").fingerprint
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert find_base(tmp_path / "hf").fingerprint != before


def test_a_base_that_moved_or_changed_is_one_sentence(lora_run, base, build, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(lora_run, tmp_path / "lora")
    hidden = base.with_name("hidden")
    base.rename(hidden)
    try:
        # Moved together they find each other.
        assert jaxlm.load(tmp_path / "lora").config.lora.rank == 4
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"adapters alone, .* is not there: put it, or a link"):
            jaxlm.load(tmp_path / "lora")
        shutil.copytree(tmp_path / "elsewhere", base)
        shutil.rmtree(step_folder(base, 60))
        shutil.copytree(step_folder(base, 30), step_folder(base, 60))
        with pytest.raises(UserError, match="has other weights now"):
            jaxlm.load(lora_run)
        # One that would continue says so too.
        with pytest.raises(UserError, match="has other weights now"):
            train.main(build("lora", train__steps=6))
    finally:
        shutil.rmtree(base, ignore_errors=True)
        hidden.rename(base)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layers": 3}, "model.num_layers=2 there, 3 now"),
        ({"d_ff": 96, "num_kv_heads": 1}, "model.num_kv_heads=2 there, 1 now, model.d_ff=64 there"),
    ],
)
def test_a_start_of_other_sizes_is_one_sentence(base, fields, words):
    config = read_config(find_model(base) / "config.yaml").model
    model = make_model(dataclasses.replace(config, **fields))
    with pytest.raises(UserError, match=rf"init_from=.* of other sizes \({words}.*leave that out"):
        start_params(base, model, make_mesh("dp1"), seed=0)


# -- what is new ----------------------------------------------------------------------------


def classifier(base, labels=("bad", "good"), **changes):
    config = read_config(find_model(base) / "config.yaml")
    model = dataclasses.replace(config.model, labels=labels)
    changes = {"task": "classification", "init_from": str(base), "seed": 3} | changes
    return dataclasses.replace(config, model=model, **changes)


def test_a_new_classifier_is_drawn_and_the_rest_is_loaded(base):
    config, lines, mesh = classifier(base), [], make_mesh("dp1")
    model = make_model(config.model)
    params = start_params(base, model, mesh, config.seed, lines.append)
    language_model = make_model(dataclasses.replace(config.model, labels=None))
    body = load_params(base, language_model, mesh)
    fresh, _ = split_boxes(jax.jit(model.init)(jax.random.key(3)))
    assert_same(params["classifier"], fresh["classifier"])
    assert_same({name: params[name] for name in body}, body)
    (line,) = lines
    assert "parameters from" in line and "new: classifier/out/kernel (32, 2)" in line
    with pytest.raises(UserError, match="has no params/classifier"):
        load_params(base, model, mesh)


def test_a_new_classifier_trains_beside_adapters_and_is_saved_with_them(base, tmp_path):
    config = classifier(base, lora=LoraConfig(rank=2), mesh="dp1")
    program = make_program(config)
    model, mesh = make_model(config.model), make_mesh("dp1")
    state = program.init_from(start_params(base, model, mesh, config.seed))
    assert set(state.params) == {"classifier", "layers"}
    assert set(state.frozen) == {"embed", "layers", "final_norm"}
    move = lambda x: x + 0.1  # noqa: E731
    state = dataclasses.replace(state, params=jax.tree.map(move, state.params))
    folder = step_folder(tmp_path, 1)
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(
            1,
            program.saved.to_exact(dataclasses.replace(state, frozen=None)),
            config_text=dump_config(config),
            tokenizer=load_tokenizer(find_model(base)),
            metrics={},
            texts={"base.json": find_base(find_model(base)).describe(folder)},
        )
    merged = program.eval_params(state)
    assert_same(load_params(folder, model, mesh), merged)
    # Other labels: another classifier, and the adapters stay in.
    other = make_model(dataclasses.replace(config.model, labels=("x", "y", "z")))
    again = start_params(folder, other, mesh, seed=0)
    assert again["classifier"]["out"]["kernel"].shape == (32, 3)
    assert_same(again["layers"], merged["layers"])
