"""Is an exported model the model? It is run in the other stack, in a process of its own.

Compared are logits (log-probabilities where a stack gives no more) at every position of several
prompts, greedy continuations, and the tokenizer's ids.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.export.expected import NEW_TOKENS, NUM_BEAMS, TEXTS, Expected
from jaxlm.export.model import Model

REPORT = "verification.json"
# Options of transformers' tokenizer: what spells a special token is text, as it is here.
PLAIN = {"split_special_tokens": True}


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
    tokenizing: Mapping[str, Any],
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
            f"{missing[0]} is not installed: pip install 'jaxlm[{stack.extra}]', then remove this "
            "export and make it again"
        )
        return dataclasses.replace(unverified, reason=reason)
    with tempfile.TemporaryDirectory() as work:
        request = _request(path, expected) | {"tokenizing": dict(tokenizing)}
        request["out"] = str(Path(work) / "answer.npz")
        answer = _run_elsewhere(stack, request, Path(work))
    versions |= json.loads(str(answer["versions"]))
    problem = str(answer["problem"]) if "problem" in answer else ""
    prompts, worst = [], 0.0
    for i, prompt in enumerate(expected.prompts):
        result = _compare_prompt(stack, expected, i, answer, tolerance)
        worst = max(worst, result["difference"])
        source = {"source": expected.sources[i]} if expected.sources else {}
        prompts.append({"tokens": prompt, **source, **result})
        problem = problem or _prompt_problem(i, result, tolerance)
    equal, different = 0, None
    for i, text in enumerate(TEXTS):
        if not (stack.loses and stack.loses in text):
            same = _same_ids(stack, expected.ids[i], answer.get(f"ids_{i}"))
            equal += same
            different = i if different is None and not same else different
    if different is not None:
        problem = problem or _ids_problem(different, expected, answer)
    made = ["greedy tokens"] * bool(expected.greedy) + ["beams"] * bool(expected.beams) + ["ids"]
    said = f"{expected.what} within {worst:.1e} of the largest, {' and '.join(made)} equal"
    return dataclasses.replace(
        unverified,
        verified=not problem,
        reason=problem or said,
        versions=versions,
        largest_difference=worst,
        prompts=prompts,
        texts_with_equal_ids=equal,
    )


def _request(path: Path, expected: Expected) -> dict[str, Any]:
    """What the other stack is asked."""
    return {
        "model": str(path),
        "use": expected.use,
        "prompts": expected.prompts,
        "sources": expected.sources,
        "texts": list(TEXTS),
        "new_tokens": NEW_TOKENS,
        "num_beams": NUM_BEAMS,
        "end": expected.end,
    }


def _versions() -> dict[str, str]:
    """Of jaxlm and what it computes with; run from its source alone, jaxlm has none."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = {"jaxlm": importlib.metadata.version("jaxlm")} | found
    return found


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
    every = np.arange(min(len(expected.prompts[i]), len(ours)))
    positions = answer.get(f"positions_{i}", every)
    ours, theirs = ours[positions], answer[f"{'logprobs' if stack.normalised else 'logits'}_{i}"]
    if ours.shape != theirs.shape:
        raise UserError(f"{stack.name} gave logits {theirs.shape} where there are {ours.shape}")
    greedy = answer[f"greedy_{i}"].tolist() if expected.greedy else []
    if expected.greedy and len(greedy) != len(expected.greedy[i]):
        raise UserError(
            f"{stack.name} gave {len(greedy)} greedy tokens where there are "
            f"{len(expected.greedy[i])}"
        )
    largest = max(float(np.abs(ours).max()), float(np.finfo(np.float32).tiny))
    apart = np.abs(ours - theirs)
    apart = np.where(np.isnan(apart), np.inf, apart).max(axis=1) / largest
    worst = int(apart.argmax())
    result = {
        "difference": float(apart[worst]),
        "at_position": int(positions[worst]),
        "largest_logit": largest,
    }
    if expected.greedy:
        result["greedy"] = _compare_greedy(expected, i, greedy, tolerance * largest)
    if expected.beams:
        result["beams"] = _compare_beams(expected, i, answer, tolerance * largest)
    return result


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


def _compare_beams(expected: Expected, i: int, answer, tolerance: float) -> str:
    """The same of the best texts of a beam search."""
    mine, other = expected.beams[i], answer[f"beams_{i}"].tolist()
    if mine.tokens == other:
        return "equal"
    near = abs(mine.score - float(answer[f"beams_score_{i}"])) <= 2 * tolerance
    kind = "a near tie" if near else "different"
    return f"{kind}: {mine.tokens} here, {other} there"


def _prompt_problem(i: int, result: dict, tolerance: float) -> str:
    if result["difference"] > tolerance:
        return (
            f"prompt {i} differs at position {result['at_position']} by {result['difference']:.1e} "
            f"of the largest logit (allowed: {tolerance:.0e})"
        )
    for how in ("greedy", "beams"):
        if result.get(how, "").startswith("different"):
            return f"prompt {i} continues differently ({how}): {result[how]}"
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
