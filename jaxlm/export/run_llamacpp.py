"""Run llama.cpp on a GGUF file: log-probabilities, greedy text, token ids.

Run by file path, in a process of its own: `python -P run_llamacpp.py REQUEST.json`. The request
has `model` (path of the .gguf), `prompts` (lists of token ids), `texts`, `new_tokens`, and `out`
(path of an .npz). For prompt i it saves `logprobs_i` [positions, V], float32, of the token after
each of `positions_i`, and the greedy continuation `greedy_i` [new_tokens]; for text i its ids
`ids_i`, special tokens not parsed, BOS as llama.cpp adds it; and `versions`, JSON.
"""

import json
import sys
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import xllamacpp

# Log-probabilities asked for in all. Each travels as some eighty bytes of JSON, so that of long
# prompts over large vocabularies only some positions are read.
MOST_VALUES = 20_000_000
EVERY_TOKEN = 2**30


class Model:
    """llama.cpp with one model, on one thread of the CPU, in as much float32 as it offers."""

    def __init__(self, path: str, length: int):
        """`length` is the number of positions there is room for."""
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = length
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Keys outside of a window are kept and masked, so that any prefix can be continued.
        params.swa_full = True
        params.warmup = False
        params.fit_params = False
        params.verbosity = 1
        self._server = xllamacpp.Server(params)
        self._open = build_opener(ProxyHandler({})).open
        self._some_token = self.tokenize("a")[-1]

    def _ask(self, path: str, **body) -> dict:
        # The binding has no call for token ids, but its server, on this machine only, has.
        address = self._server.listening_address + path
        request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self._open(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, with BOS as llama.cpp adds it."""
        return self._ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of what comes after `ids`, float32 [V]."""
        answer = self._ask(
            "/completion",
            prompt=ids,
            n_predict=1,
            n_probs=EVERY_TOKEN,
            temperature=0,
            cache_prompt=True,
            # A sampled token that is no whole character would hold the answer back. The
            # probabilities are those before this bias.
            logit_bias=[[self._some_token, 1e6]],
        )
        pairs = answer["completion_probabilities"][0]["top_logprobs"]
        values = np.empty(len(pairs), np.float32)
        for pair in pairs:
            values[pair["id"]] = pair["logprob"]
        return values

    def continuation(self, ids: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after `ids`, one after the other."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logprobs(ids).argmax()))
        return ids[len(ids) - count :]


def read_positions(prompts: list[list[int]], vocab_size: int) -> list[np.ndarray]:
    """The positions of each prompt to read: all, or as many at equal distances as there is room."""
    values = sum(map(len, prompts)) * vocab_size
    step = max(1, -(-values // MOST_VALUES))
    return [np.arange(len(ids) - 1, -1, -step)[::-1] for ids in prompts]


def versions() -> dict[str, str]:
    """Versions of the binding and of the llama.cpp in it."""
    # The binding's version ends in the number of llama.cpp's build, which it may not tell itself.
    build = xllamacpp.BUILD_INFO["build_number"] or xllamacpp.__version__.split(".")[-1]
    return {"xllamacpp": xllamacpp.__version__, "llama.cpp": f"b{build}"}


def main(request_file: str) -> None:
    """Do what the request says."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    prompts, new_tokens = request["prompts"], request["new_tokens"]
    model = Model(request["model"], max(map(len, prompts), default=0) + new_tokens + 1)
    results = {"versions": json.dumps(versions())}
    for i, text in enumerate(request["texts"]):
        results[f"ids_{i}"] = np.array(model.tokenize(text), np.int64)
    if prompts:
        vocab_size = len(model.logprobs(prompts[0][:1]))
        for i, positions in enumerate(read_positions(prompts, vocab_size)):
            rows = [model.logprobs(prompts[i][: end + 1]) for end in positions]
            results[f"positions_{i}"] = positions
            results[f"logprobs_{i}"] = np.stack(rows)
            results[f"greedy_{i}"] = np.array(model.continuation(prompts[i], new_tokens), np.int64)
    np.savez(request["out"], **results)


if __name__ == "__main__":
    main(sys.argv[1])
