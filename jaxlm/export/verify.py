"""Is an exported model the model? It is run in the other stack, in a process of its own.

Compared are logits (log-probabilities where a stack gives no more) at every position of several
prompts, greedy continuations, and the tokenizer's ids.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decode import Sampling, build_decode_program
from jaxlm.errors import UserError
from jaxlm.export.huggingface import Model
from jaxlm.mesh import make_mesh
from jaxlm.models.build import make_model
from jaxlm.nn.attention import Places

REPORT = "verification.json"
NEW_TOKENS = 12
PROMPT_TOKENS = 40
LONGEST_WINDOW = 512
TEXTS = (
    "Once upon a time there was a model, and it had to be the same everywhere.",
    "def f(x):\n\tif x <= 0:\n\t    return None  # nothing\n\treturn {'a': [x ** 2, 1e-5]}\n",
    "大型语言模型与并行计算。今天天气很好！",
    "emoji 😀👩‍👩‍👧‍👦 and accents: naïve façade, e\u0301, Ünïcödé",
    "  two spaces, \t a tab,\r\n\r\na line of Windows   and   gaps  ",
    "<s> not a token </s> <|endoftext|> [INST] \u2581 0123456789 3.14159",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते",
    "",
)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Another stack: what runs a model there, and how close it has to come."""

    packages: tuple[str, ...]
    """What has to be installed, the stack itself first."""
    extra: str
    """The extra of jaxlm that installs it."""
    script: str
    tolerance: dict[str, float]
    """By type of the weights: the largest difference allowed, as a share of the largest number."""
    normalised: bool = False
    """It gives log-probabilities."""
    loses: str = ""
    """A character that its tokenizers cannot tell from another: texts with it are left out."""
    reorders: bool = False
    """Of pieces that are equally good together it may take another order."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.packages[0]


# Both compute in float32 from the same rounded weights, whatever the weights' type.
ROUNDED = ("bfloat16", "float16")
_EXACT = dict.fromkeys(("float32", *ROUNDED), 1e-4)
TRANSFORMERS = Stack(("transformers", "torch"), "hf", "run_transformers.py", _EXACT)
STABLEHLO = Stack(("jax", "flatbuffers"), "stablehlo", "run_stablehlo.py", _EXACT)
# llama.cpp rounds activations to the weights' type in its products, and to eight bits for Q8_0.
LLAMA_CPP = Stack(
    ("xllamacpp",),
    "gguf",
    "run_llamacpp.py",
    {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2, "q8_0": 1e-1},
    normalised=True,
    loses="\u2581",  # which it takes for a space
    reorders=True,
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """How an exported model compares with the model it was written from."""

    verified: bool
    reason: str
    """Why it is not verified, or what was compared, in a sentence."""
    stack: str
    versions: dict[str, str]
    dtype: str
    tolerance: float
    """Allowed difference, as a share of the largest logit."""
    largest_difference: float | None = None
    """The same share, measured."""
    prompts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    texts_with_equal_ids: int | None = None

    def write(self, folder: Path) -> None:
        """Put the report beside the model."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the model itself computes."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    logits: list[np.ndarray]
    """[tokens of prompt and continuation, V] float32."""
    ids: list[list[int]]
    """Of each of TEXTS."""


def expected_of(model: Model, dtype: str | None) -> Expected:
    """Run the model on prompts of its own, in float32, its weights rounded to `dtype` first.

    Raises UserError where its logits are not finite.
    """
    config = dataclasses.replace(
        model.config, dtype="float32", attention="plain", dropout=0.0, attention_dropout=0.0
    )
    decoder, params = make_model(config), model.params
    if dtype is not None:
        # By NumPy, as they are written.
        round_ = lambda x: jnp.asarray(np.asarray(x).astype(dtype).astype(x.dtype))  # noqa: E731
        params = jax.tree.map(round_, params)
    prefix = model.prefix or [model.tokenizer.bos_id]
    ids = [[*model.prefix, *model.tokenizer.encode(text)] for text in TEXTS]
    prompts = _prompts(config, [prefix + i[len(model.prefix) :] for i in ids])
    with jax.default_matmul_precision("highest"):
        program = build_decode_program(decoder, make_mesh("dp1"))
        (greedy,) = program.generate(
            program.prepare(params),
            prompts,
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(temperature=0.0),
            eos_id=None,
        )
        rows = [prompt + new for prompt, new in zip(prompts, greedy, strict=True)]
        logits = _logits(decoder, params, rows)
    if not all(np.isfinite(values).all() for values in logits):
        rounded = "" if dtype is None else f" once its weights are rounded to {dtype}"
        raise UserError(
            f"the model computes numbers that are not finite{rounded}, so that nothing can be "
            "compared: export another step, or another dtype"
        )
    return Expected(prompts, greedy, logits, ids)


def _logits(decoder, params, rows: list[list[int]]) -> list[np.ndarray]:
    """Logits [T, V] at every position of each row, one row at a time: a vocabulary is large."""

    @jax.jit
    def run(params, tokens):
        places = Places(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        hidden, *_ = decoder.hidden(params, tokens, places)
        return decoder.logits(params, hidden)[0]

    longest = max(map(len, rows))
    padded = (np.array([row + [0] * (longest - len(row))], np.int32) for row in rows)
    return [
        np.asarray(run(params, tokens))[: len(row)]
        for row, tokens in zip(rows, padded, strict=True)
    ]


def _prompts(config, encoded: list[list[int]]) -> list[list[int]]:
    """Beginnings of texts, and random tokens past a window or to where context ends."""
    room = max(config.max_seq_len - NEW_TOKENS, 1)
    prompts = [ids[: min(PROMPT_TOKENS, room)] for ids in encoded[:4]]
    window = config.sliding_window or 0
    longer = window + 16 if window <= LONGEST_WINDOW else 0
    draw = np.random.default_rng(0).integers(0, config.vocab_size, max(64, longer))
    return [*prompts, draw[:room].tolist()]


def skipped(stack: Stack, dtype: str) -> Verification:
    """The report of an export that nobody looked at."""
    return Verification(
        False, "verification was skipped", stack.name, _versions(), dtype, stack.tolerance[dtype]
    )


def verify(
    stack: Stack,
    model: Model,
    path: Path,
    dtype: str,
    expected: Expected,
    tokenizing: Mapping[str, Any] = MappingProxyType({}),
) -> Verification:
    """Run what was written at `path` in the other stack, and compare.

    `tokenizing` are options of transformers' tokenizer. Where the stack is not installed the
    result is unverified, and says how to install it.
    """
    versions, tolerance = _versions(), stack.tolerance[dtype]
    unverified = Verification(False, "", stack.name, versions, dtype, tolerance)
    missing = [name for name in stack.packages if importlib.util.find_spec(name) is None]
    if missing:
        reason = (
            f"{missing[0]} is not installed: pip install 'jaxlm[{stack.extra}]', then export again"
        )
        return dataclasses.replace(unverified, reason=reason)
    with tempfile.TemporaryDirectory() as work:
        request = {
            "model": str(path),
            "prompts": expected.prompts,
            "texts": list(TEXTS),
            "tokenizing": dict(tokenizing),
            "new_tokens": NEW_TOKENS,
            "out": str(Path(work) / "answer.npz"),
        }
        answer = _run_elsewhere(stack, request, Path(work))
    versions |= json.loads(str(answer["versions"]))
    problem = str(answer["problem"]) if "problem" in answer else ""
    prompts, worst = [], 0.0
    for i, prompt in enumerate(expected.prompts):
        result = _compare_prompt(stack, expected, i, answer, tolerance)
        worst = max(worst, result["difference"])
        prompts.append({"tokens": prompt, **result})
        problem = problem or _prompt_problem(i, result, tolerance)
    equal, different = 0, None
    for i, text in enumerate(TEXTS):
        if not (stack.loses and stack.loses in text):
            same = _same_ids(stack, expected.ids[i], answer.get(f"ids_{i}"))
            equal += same
            different = i if different is None and not same else different
    if different is not None:
        problem = problem or _ids_problem(different, expected, answer)
    said = f"logits within {worst:.1e} of the largest, greedy tokens and ids equal"
    return dataclasses.replace(
        unverified,
        verified=not problem,
        reason=problem or said,
        versions=versions,
        largest_difference=worst,
        prompts=prompts,
        texts_with_equal_ids=equal,
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jaxlm", "jax", "numpy")}


def _run_elsewhere(stack: Stack, request: dict[str, Any], work: Path) -> dict[str, np.ndarray]:
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name(stack.script)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(work / "request.json")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (work / "answer.npz").exists():
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-1:]
        raise UserError(
            f"{stack.name} could not run {request['model']}: {last[0] if last else done.returncode}"
        )
    with np.load(work / "answer.npz") as answer:
        return dict(answer)


def _compare_prompt(stack: Stack, expected: Expected, i: int, answer, tolerance: float) -> dict:
    """The largest difference at any position of a prompt, and how far greedy texts agree."""
    logits = expected.logits[i]
    ours = _log_softmax(logits) if stack.normalised else logits
    positions = answer.get(f"positions_{i}", np.arange(len(expected.prompts[i])))
    ours, theirs = ours[positions], answer[f"{'logprobs' if stack.normalised else 'logits'}_{i}"]
    if ours.shape != theirs.shape:
        raise UserError(f"{stack.name} gave logits {theirs.shape} where there are {ours.shape}")
    greedy = answer[f"greedy_{i}"].tolist()
    if len(greedy) != len(expected.greedy[i]):
        raise UserError(
            f"{stack.name} gave {len(greedy)} greedy tokens where there are "
            f"{len(expected.greedy[i])}"
        )
    largest = max(float(np.abs(ours).max()), float(np.finfo(np.float32).tiny))
    apart = np.abs(ours - theirs)
    apart = np.where(np.isnan(apart), np.inf, apart).max(axis=1) / largest
    worst = int(apart.argmax())
    return {
        "difference": float(apart[worst]),
        "at_position": int(positions[worst]),
        "largest_logit": largest,
        "greedy": _compare_greedy(expected, i, greedy, tolerance * largest),
    }


def _compare_greedy(expected: Expected, i: int, theirs: list[int], tolerance: float) -> str:
    """Whether greedy texts are equal, nearly tied where they part, or different."""
    start = len(expected.prompts[i]) - 1
    for k, (mine, other) in enumerate(zip(expected.greedy[i], theirs, strict=True)):
        if mine != other:
            logits = expected.logits[i][start + k]
            near = logits[mine] - logits[other] <= 2 * tolerance
            kind = "a near tie" if near else "different"
            return f"{kind} at token {k}: {mine} here, {other} there"
    return "equal"


def _prompt_problem(i: int, result: dict, tolerance: float) -> str:
    if result["difference"] > tolerance:
        return (
            f"prompt {i} differs at position {result['at_position']} by {result['difference']:.1e} "
            f"of the largest logit (allowed: {tolerance:.0e})"
        )
    if result["greedy"].startswith("different"):
        return f"prompt {i} continues differently: {result['greedy']}"
    return ""


def _same_ids(stack: Stack, ours: list[int], theirs) -> bool:
    theirs = None if theirs is None else theirs.tolist()
    return theirs == ours or bool(stack.reorders and theirs and sorted(theirs) == sorted(ours))


def _ids_problem(i: int, expected: Expected, answer) -> str:
    ours, theirs = expected.ids[i], answer.get(f"ids_{i}")
    theirs = [] if theirs is None else theirs.tolist()
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    there = slice(max(0, at - 1), at + 4)
    return (
        f"the tokenizers differ on {TEXTS[i]!r} from token {at} on: {ours[there]} here, "
        f"{theirs[there]} there"
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
