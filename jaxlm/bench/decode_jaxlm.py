"""jaxlm's side of the decoding benchmark: `python -m jaxlm.bench.decode_jaxlm`, asked by lines."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.api import load
from jaxlm.bench.answering import answer
from jaxlm.bench.train_jaxlm import peak_bytes
from jaxlm.cli import build_config
from jaxlm.export.exporter import export_model
from jaxlm.export.model import Model
from jaxlm.models.build import make_model, param_shapes
from jaxlm.models.head import VOCABULARY_HEAD
from jaxlm.sharding import split_boxes
from jaxlm.texts import generate
from jaxlm.tokenizer import load_tokenizer


class Side:
    """What answers."""

    def __init__(self):
        self.model = None

    def write(self, settings: dict, dtype: str, out: str) -> dict:
        """Write a model of random weights as transformers has it, with a tokenizer of words."""
        config = build_config({"model": settings}).model
        words = Path(out).with_suffix(".words")
        words.mkdir()
        write_words(words, config.vocab_size)
        params, _ = split_boxes(make_model(config).init(jax.random.key(0)))
        model = Model("random", config, params, load_tokenizer(words), [0], {})
        export_model(model, "hf", Path(out), dtype=dtype, skip=True, say=lambda line: None)
        return {}

    def setup(self, folder: str, dtype: str) -> dict:
        """Load a model; what it is, and the bytes that a new token has to read."""
        self.model = None  # which would count beside the next
        self.model = load(folder, dtype=dtype)
        config = self.model.config.model
        leaves = jax.tree_util.tree_leaves_with_path(self.model.params)
        has_head = VOCABULARY_HEAD in self.model.params
        looked_up = lambda path: has_head and "embedding" in str(path)  # noqa: E731
        row = 2 * config.num_layers * config.kv_heads * config.head_size
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))),
            "weight_bytes": sum(leaf.nbytes for path, leaf in leaves if not looked_up(path)),
            "cache_bytes_per_position": row * jnp.dtype(config.dtype).itemsize,
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
        }

    def encode(self, prompts: list[str]) -> dict:
        """The ids that the model reads for prompts."""
        rows = self.model.tokenizer.encode_batch(prompts)
        return {"ids": [[*self.model.prefix, *row] for row in rows]}

    def generate(self, prompts: list[str], new_tokens: int) -> dict:
        """Continue prompts greedily; the words of the continuations."""
        texts = generate(self.model, prompts, max_new_tokens=new_tokens, temperature=0)
        return {"made": [text.split() for text in texts]}

    def steps(self, prompts: list[str], new_tokens: int, count: int) -> dict:
        """Generate so many times and time it."""
        started = time.monotonic()
        for _ in range(count):
            self.generate(prompts, new_tokens)
        return {"seconds": time.monotonic() - started}

    def memory(self) -> dict:
        """Peak bytes: of the device or, on a CPU, resident."""
        return {"peak_bytes": peak_bytes()}

    def bandwidth(self, size: int) -> dict:
        """Bytes a second that reading an array of `size` bytes reaches: the best of two ways."""
        x = jnp.ones((size // 4 // 4096, 4096))
        ways = jax.jit(lambda x: x.sum()), jax.jit(lambda x: x @ jnp.ones(4096))
        best = float("inf")
        for way in ways:
            way(x).block_until_ready()
            for _ in range(5):
                started = time.monotonic()
                way(x).block_until_ready()
                best = min(best, time.monotonic() - started)
        return {"bytes_per_second": x.nbytes / best}


def write_words(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose pieces are `<s>` and the words w1, w2, ...: a word a token, both ways."""
    names = ["<s>", *(f"▁w{i}" for i in range(1, vocab_size))]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "WordLevel", "vocab": {n: i for i, n in enumerate(names)}, "unk_token": "<s>"}
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    parts |= {"normalizer": None, "pre_tokenizer": space, "post_processor": None, "decoder": space}
    (folder / "tokenizer.json").write_text(json.dumps(parts | {"model": model}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', encoding="utf-8")


if __name__ == "__main__":
    answer(Side())
