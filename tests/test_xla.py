"""The options that overlap collectives with compute are ones that XLA knows."""

import subprocess
import sys

import jax
import pytest
from conftest import as_users_have_it
from tiny import make_program, random_batch, tiny_config

from jaxlm import step
from jaxlm.xla import NVIDIA_OVERLAP, compiler_options


def compile_with(options):
    return jax.jit(lambda x: x + 1, compiler_options=options)(1.0)


@pytest.mark.parametrize("name", NVIDIA_OVERLAP)
def test_the_installed_xla_knows_every_option(name):
    assert compile_with({name: NVIDIA_OVERLAP[name]}) == 2.0


def test_an_invented_option_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_wishful_thinking"):
        compile_with({"xla_gpu_enable_wishful_thinking": True})


@pytest.mark.parametrize(
    ("backend", "overlap", "wanted"),
    [("gpu", True, NVIDIA_OVERLAP), ("gpu", False, None), ("cpu", True, None), ("tpu", True, None)],
)
def test_only_nvidia_and_only_when_asked(backend, overlap, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert compiler_options(overlap) == wanted


def test_an_option_that_xla_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(NVIDIA_OVERLAP, "xla_gpu_enable_wishful_thinking", True)
    left = compiler_options(overlap=True)
    assert left == {k: v for k, v in NVIDIA_OVERLAP.items() if "wishful" not in k}


def test_the_training_step_is_compiled_with_them(monkeypatch):
    asked, wish = [], {"xla_gpu_enable_wishful_thinking": True}
    monkeypatch.setattr(step, "compiler_options", lambda overlap: asked.append(overlap) or wish)
    config = tiny_config(model={"num_layers": 1}, parallel={"overlap": False})
    program = make_program(config)
    assert asked == [False]
    traced = program.train_step.lower(program.layout.stored, program.put(random_batch(config)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="wishful_thinking"):
        traced.compile()


@pytest.mark.slow
def test_chains_of_collectives_do_not_wait_for_each_other(tmp_path):
    """Compiled without regard to order, this run stands still in its first step."""
    settings = "model.d_model=64 model.num_layers=2 model.d_ff=128 model.max_seq_len=128 "
    settings += "tokenizer.vocab_size=600 train.batch_size=8 train.steps=2 train.eval_batches=1"
    command = [sys.executable, "-m", "jaxlm.train", "--mesh=dp2,fsdp2,tp2", f"--out={tmp_path}/run"]
    command += [f"--{setting}" for setting in settings.split()]
    done = subprocess.run(
        command, env=as_users_have_it(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
