"""Runs a StableHLO folder with JAX alone, without jaxlm; `verify` starts it as a process."""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.export
import ml_dtypes
import numpy as np
import tokenizers

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read_params(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = np.frombuffer(values[start:end], TYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


def main(request: dict) -> None:
    """Answer a request: logits, greedy continuations in one padded batch, ids of texts."""
    folder, prompts = Path(request["model"]), request["prompts"]
    params = read_params(folder / "params.safetensors")
    forward, prefill, decode = (
        jax.jit(jax.export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call)
        for name in ("forward", "prefill", "decode")
    )
    answer = {"versions": json.dumps({"jax": jax.__version__})}
    for i, prompt in enumerate(prompts):
        answer[f"logits_{i}"] = np.asarray(forward(params, np.array([prompt], np.int32)))[0]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    logits, cache = prefill(params, tokens, lengths)
    made = [np.argmax(logits, -1).astype(np.int32)]
    while len(made) < request["new_tokens"]:
        logits, cache = decode(params, made[-1], cache)
        made.append(np.argmax(logits, -1).astype(np.int32))
    for i, row in enumerate(np.stack(made, axis=1)):
        answer[f"greedy_{i}"] = row
    if "jaxlm" in sys.modules:
        answer["problem"] = "the process has imported jaxlm"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for i, text in enumerate(request["texts"]):
        answer[f"ids_{i}"] = np.array(tokenizer.encode(text).ids, np.int64)
    np.savez(request["out"], **answer)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
