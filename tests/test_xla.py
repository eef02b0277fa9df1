"""The options that overlap collectives with compute are ones that XLA knows."""

import jax
import pytest

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


def test_no_options_on_this_cpu():
    assert jax.default_backend() == "cpu"
    assert compiler_options(overlap=True) is None
