"""Every test sees eight virtual CPU devices; runs and corpora that tests share."""

import mmap
import os
import random
import shutil
import tempfile
from pathlib import Path

import hypothesis
import jax
import jaxlib
import pytest

from jaxlm.xla import keep_order_on_cpu

# Most of the suite's time is XLA's, for programs that run for milliseconds. So this process and
# those that tests start compile to slower code, in a third of the time, and share what they
# compiled, but nothing with another session: a cache that is there would hide what is slow or
# says something. `as_users_have_it` is the environment for a process that optimises.
# pytest-xdist's workers inherit the variables that the process which started them has set.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxlm_tests_xla_")
    os.environ["JAXLM_TESTS_GIVEN_XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]
FLAGS = os.environ["JAXLM_TESTS_GIVEN_XLA_FLAGS"]
QUICK_EMITTERS = "xla_cpu_use_fusion_emitters"


def knows(flag: str) -> bool:
    """Whether the installed XLA has a flag; it ends a process that asks for another."""
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return m.find(f"\0{flag}\0".encode()) >= 0
    return False


def as_users_have_it() -> dict[str, str]:
    """The environment for a process that compiles and caches as it would outside of the tests."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": FLAGS}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    return environment


os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# JAX chose 1 when it was imported, before jaxlm could: a user's process says less.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
if knows(QUICK_EMITTERS):
    os.environ["XLA_FLAGS"] = f"{FLAGS} --{QUICK_EMITTERS}=false".strip()
# This process's JAX has read its variables already.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_num_cpu_devices", 8)
keep_order_on_cpu(8)

# A busy machine is not a failure, and the same examples each time make a failure repeatable.
hypothesis.settings.register_profile("jaxlm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxlm")


def pytest_unconfigure():
    """Remove the cache when the session ends."""
    if not IS_WORKER:
        shutil.rmtree(CACHE, ignore_errors=True)


TINY_RUN = {
    "model.d_model": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.d_ff": 64,
    "model.max_seq_len": 64,
    "tokenizer.vocab_size": 320,
    "train.steps": 60,
    "train.batch_size": 8,
    "train.eval_every": 30,
    "train.eval_batches": 2,
    "train.sample_tokens": 4,
    "train.sample_prompt": "a",
    "optim.warmup_steps": 5,
    "optim.name": "adamw",
    "optim.learning_rate": 0.01,
    "checkpoint.every_steps": 30,
    "data.workers": 1,
    "mesh": "dp2,tp2",
}


def tiny_arguments(**changes) -> list[str]:
    """A command line for a tiny run; a changed key is written with `__` for its dot."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in (TINY_RUN | changes).items()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty short documents of a hundred made-up words, some of them not ASCII."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopé你😀", k=5)) for _ in range(100)]
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:03}.txt").write_text(" ".join(choose.choices(words, k=200)))
    return folder


@pytest.fixture(scope="session")
def trained_run(corpus, tmp_path_factory) -> Path:
    """A run folder of a tiny model, trained on `corpus`; do not write into it."""
    from jaxlm import train

    home = tmp_path_factory.mktemp("trained")
    code = train.main(tiny_arguments(data__train=corpus, data__cache=home, out=home / "run"))
    assert code == 0
    return home / "run"


@pytest.fixture(scope="session")
def compilations() -> list:
    """Grows with every compilation."""
    seen = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


@pytest.fixture
def strict():
    """No silent promotion of types or ranks. Optax and parts of Flax raise under it."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def small_run(corpus, tmp_path_factory):
    """Builds the command line of a tiny run for processes that share a cache."""
    cache = tmp_path_factory.getbasetemp() / "small_run_cache"

    def build(**changes) -> list[str]:
        """A run that says little and never validates but at the end."""
        quiet = {"train__eval_every": 0, "train__sample_prompt": "", "model__max_seq_len": 32}
        places = {"data__train": corpus, "data__cache": cache}
        arguments = tiny_arguments(**(quiet | places | changes))
        # Without a prompt, the length of its sample would be refused as of no effect.
        silent = "train__sample_prompt" not in changes
        return [a for a in arguments if not (silent and a.startswith("--train.sample_tokens"))]

    return build
