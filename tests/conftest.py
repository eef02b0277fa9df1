"""Every test sees eight virtual CPU devices; runs and corpora that tests share."""

import random
from pathlib import Path

import hypothesis
import jax
import pytest

from jaxlm.xla import keep_order_on_cpu

jax.config.update("jax_num_cpu_devices", 8)
keep_order_on_cpu()

# A busy machine is not a failure, and the same examples each time make a failure repeatable.
hypothesis.settings.register_profile("jaxlm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxlm")


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


@pytest.fixture(scope="module")
def quick_compile():
    """Compile in less time to slower code, for tests of many small programs.

    For a whole module, because a change of it compiles everything again.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
