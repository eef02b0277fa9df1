"""What a GPU computes by another formula is what a CPU computes: both formulas on a CPU."""

import jax
import numpy as np
import optax
import pytest
from test_decode import CONFIG, GREEDY, PROMPTS
from test_step import remembering, small_config
from tiny import exact, make_program, random_batch

from jaxlm.decode import DecodeProgram, build_decode_program
from jaxlm.losses import online_logsumexp
from jaxlm.mesh import make_mesh
from jaxlm.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("strict")

GPT = {"norm": "layernorm", "norm_bias": True, "mlp": "gelu", "mlp_bias": True, "qkv_bias": True}


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Traces what is traced from now on for a GPU."""

    def switch():
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    return switch


def first_update(model: dict, mesh: str):
    """(loss, gradients) of the first update, traced anew."""
    model = {"dtype": "float32"} | model
    config = small_config(model=model, train={"z_loss": 1e-2, "accumulation": 1})
    program = make_program(config, mesh, remembering)
    state, metrics = program.train_step(program.init(), program.put(random_batch(config)))
    return float(metrics["loss"]), exact(program, state).opt_state


@pytest.mark.parametrize(("model", "mesh"), [(GPT, "dp1"), ({}, "dp2,tp2")], ids=["gpt", "llama"])
def test_an_update_is_the_same(as_on_gpu, monkeypatch, model, mesh):
    loss, gradients = first_update(model, mesh)
    as_on_gpu()
    monkeypatch.setattr("jaxlm.step.compiler_options", lambda overlap: None)
    used = []
    spy = lambda *args, **named: used.append(1) or online_logsumexp(*args, **named)  # noqa: E731
    monkeypatch.setattr("jaxlm.losses.online_logsumexp", spy)
    other, others = first_update(model, mesh)
    assert used
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    apart = optax.tree.norm(jax.tree.map(np.subtract, gradients, others))
    assert apart < 1e-5 * optax.tree.norm(gradients)


def test_greedy_texts_are_the_same(as_on_gpu, monkeypatch):
    def made(prompts):
        program = build_decode_program(Decoder(CONFIG.model), make_mesh("dp1"))
        params = program.prepare(make_program(CONFIG).init().params)
        settings = {"max_new_tokens": 12, "sampling": GREEDY, "eos_id": None}
        return list(program.generate(params, prompts, **settings))[-1]

    alone = [made([prompt])[0] for prompt in PROMPTS[:2]]
    as_on_gpu()
    rows = []
    prompt_of = DecodeProgram._prompt

    def spy(self, prompts, sources):
        rows.append(len(prompts))
        return prompt_of(self, prompts, sources)

    monkeypatch.setattr(DecodeProgram, "_prompt", spy)
    assert [made([prompt])[0] for prompt in PROMPTS[:2]] == alone
    assert made(PROMPTS[:3])[:2] == alone
    assert rows == [2, 2, 3]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_online_logsumexp(scale):
    x = scale * np.random.default_rng(0).normal(size=(5, 3, 1001)).astype(np.float32)
    x[0, 0, 7] = -np.inf
    ours = jax.jit(online_logsumexp, static_argnames="axis")(x, axis=-1)
    np.testing.assert_allclose(ours, jax.nn.logsumexp(x, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [np.inf, np.inf], [-np.inf] * 9])
def test_what_is_not_finite_stays_so(values):
    x = np.zeros((1, 9), np.float32)
    x[0, : len(values)] = values
    assert not np.isfinite(online_logsumexp(x, axis=-1)).any()
