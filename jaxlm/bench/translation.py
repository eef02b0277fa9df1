"""Translation beside Marian of transformers, which PyTorch trains on the same pairs.

Both have the same sizes, the same SentencePiece vocabulary and the same number of tokens (of source
and target, without padding). They run one after the other: each has the machine to itself.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxlm.api import load
from jaxlm.bench import tables
from jaxlm.cli import read_config
from jaxlm.config import Config
from jaxlm.data.corpus import prepare
from jaxlm.errors import UserError
from jaxlm.huge_pages import without_huge_pages
from jaxlm.models.build import param_shapes
from jaxlm.monitor import read_metrics
from jaxlm.run_folder import find_step
from jaxlm.tasks.build import make_form
from jaxlm.tasks.metrics import translation_scores
from jaxlm.texts import translate

PEER = Path(__file__).with_name("run_marian.py")
BEAMS = (1, 4)
# The peer's recipe: that of Vaswani et al. (2017), with a warm-up that fits the short run.
RECIPE = {"learning_rate": 1e-3, "warmup_steps": 600, "dropout": 0.1}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one side came to."""

    name: str
    parameters: int
    tokens: int
    """Of source and target, without padding, that it was trained on."""
    seconds: float
    """That its updates took."""
    scores: dict[str, tuple[float, float]]
    """(BLEU, chrF) of the validation sources by the size of the beam."""


def run(
    config_path: str,
    train: str,
    valid: str,
    language: str,
    tokens: int,
    limit: int,
    out: Path,
    say: Callable[[str], None],
) -> list[Result]:
    """Train both sides on about `tokens` tokens and translate the first `limit` validation sources.

    What was trained before in `out` is taken from there. Raises UserError for files and settings
    that do not fit, and where transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError("this benchmark needs transformers and torch: pip install 'jaxlm[bench]'")
    config = read_config(Path(config_path))
    data = dataclasses.replace(config.data, train=(train,), valid=(valid,))
    config = dataclasses.replace(config, data=data)
    rows = _pairs(valid, limit)
    prepared = prepare(config.data, config.tokenizer, say, make_form(config))
    (file,) = prepared.train
    per_step = config.train.batch_size * file.num_tokens / (len(file.rows) - 1)
    steps = max(1, round(tokens / per_step))
    ours = _train(config_path, config, train, valid, steps, out / "jaxlm", say)
    result = _ours(ours, rows, language, round(steps * per_step), say)
    request = RECIPE | {
        "tokenizer": str(find_step(ours) / "tokenizer.model"),
        "train": train,
        "valid": valid,
        "tokens": result.tokens,
        "longest": config.seq_len,
        "limit": len(rows),
        "beams": BEAMS,
        **{name: getattr(config.model, name) for name in ("d_model", "d_ff")},
        "layers": config.model.num_layers,
        "heads": config.model.num_heads,
        "answer": str(out / "marian.json"),
    }
    return [result, _peer(request, [reference for _, reference in rows], language, out, say)]


def _pairs(path: str, limit: int) -> list[list[str]]:
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()[:limit]
    return [line.split("\t")[:2] for line in lines]


def _train(config_path, config: Config, train: str, valid: str, steps: int, run: Path, say) -> Path:
    command = [sys.executable, "-m", "jaxlm.train", f"--config={config_path}", f"--out={run}"]
    command += [f"--data.train={train}", f"--data.valid={valid}", f"--train.steps={steps}"]
    say(" ".join(command[1:]))
    subprocess.run(command, check=True)
    return run


def _ours(run: Path, rows: list[list[str]], language: str, tokens: int, say) -> Result:
    steps = [row for row in read_metrics(run / "metrics.jsonl") if "step_seconds" in row]
    model = load(run)
    sources, references = zip(*rows, strict=True)
    scores = {}
    for beams in BEAMS:
        started = time.monotonic()
        texts = translate(model, list(sources), num_beams=beams, length_penalty=0.6)
        say(f"jaxlm: {len(texts)} texts, beam {beams}, in {time.monotonic() - started:.0f} s")
        found = translation_scores(texts, references, language)
        scores[f"beam{beams}"] = found.bleu, found.chrf
    size = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model.config.model)))
    seconds = sum(row["step_seconds"] for row in steps)
    return Result("jaxlm", size, tokens, seconds, scores)


def _peer(request: dict, references: list[str], language: str, out: Path, say) -> Result:
    answer, asked = Path(request["answer"]), out / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    if not answer.exists():
        say("training Marian by PyTorch")
        command = [sys.executable, "-P", str(PEER), str(asked)]
        subprocess.run(command, check=True, env=without_huge_pages(os.environ))
    found = json.loads(answer.read_text(encoding="utf-8"))
    scores = {}
    for beams in BEAMS:
        measured = translation_scores(found[f"beam{beams}"], references, language)
        scores[f"beam{beams}"] = measured.bleu, measured.chrf
    return Result("marian", found["parameters"], found["tokens"], found["seconds"], scores)


def table(results: list[Result]) -> str:
    """The figures as a person reads them."""
    rows = [("", "parameters", "tokens", "seconds", "tok/s", "  BLEU / chrF by beam")]
    for r in results:
        scores = ", ".join(f"{beam} {b:.1f} / {c:.1f}" for beam, (b, c) in r.scores.items())
        numbers = (r.parameters, r.tokens, round(r.seconds), round(r.tokens / r.seconds))
        rows.append((r.name, *(f"{n:,}" for n in numbers), f"  {scores}"))
    return tables.table((-8, 12, 12, 9, 8, -40), rows)
