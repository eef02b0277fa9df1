"""Writing a model for another stack: beside its place first, and there once it is verified."""

import errno
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxlm.errors import UserError, nearest
from jaxlm.export import verify
from jaxlm.export.expected import expected_of
from jaxlm.export.families import family_for
from jaxlm.export.gguf import write_gguf
from jaxlm.export.huggingface import write_model
from jaxlm.export.model import Model
from jaxlm.export.stablehlo import write_stablehlo
from jaxlm.export.verify import Verification
from jaxlm.export.vocabulary import write_tokenizer
from jaxlm.model_config import ModelConfig

STACKS: Mapping[str, verify.Stack] = {
    "hf": verify.TRANSFORMERS,
    "gguf": verify.LLAMA_CPP,
    "stablehlo": verify.STABLEHLO,
}
GGUF_FILE = "model.gguf"
SHARD_GB = 5.0
HINTS = {
    ("hf", "qwen2"): "; transformers reads the tokenizer of every qwen2 model as Qwen's own: use "
    "Qwen's, or train with model.qkv_bias=false",
}


def export_model(
    model: Model,
    to: str,
    out: Path,
    *,
    dtype: str = "float32",
    family: str | None = None,
    shard_gb: float | None = None,
    skip: bool = False,
    say: Callable[[str], None],
) -> Verification:
    """Write a model into the new folder `out`, in the form of `to`, and verify it there.

    `skip` leaves the verification out. Raises UserError for an `out` that exists, for a model that
    cannot be written so, and, with nothing left behind, for one that computes something else
    there.
    """
    stack = check_target(to, dtype, out, family, shard_gb)
    check_kind(to, model.config)
    table = None if to == "stablehlo" else family_for(model.config, family)
    with _beside(out) as draft:
        say(f"writing {out} ({to}, {dtype})")
        path = _write(model, to, draft, dtype, table, shard_gb or SHARD_GB)
        if skip:
            report = verify.skipped(stack, dtype)
        else:
            say(f"verifying it with {stack.name}")
            rounded = dtype if dtype in verify.ROUNDED else None
            asked = {} if model.tokenizer.chat_template is None else verify.PLAIN
            expected = expected_of(model, rounded)
            report = verify.verify(stack, model, path, dtype, expected, asked)
            if not report.verified and report.prompts:
                hint = HINTS.get((to, table and table.model_type), "")
                raise UserError(f"{stack.name} runs another model: {report.reason}{hint}")
        report.write(draft)
        draft.rename(out)
    return report


def check_target(
    to: str, dtype: str, out: Path, family: str | None = None, shard_gb: float | None = None
) -> verify.Stack:
    """The stack that `to` names. Raises UserError for what is not known, or is not used there."""
    if to not in STACKS:
        raise UserError(f"to={to!r} is not known{nearest(to, STACKS)} (use {', '.join(STACKS)})")
    types = STACKS[to].tolerance
    if dtype not in types:
        raise UserError(f"dtype={dtype!r} cannot be written to {to}: use {', '.join(types)}")
    if family is not None and to == "stablehlo":
        raise UserError(f"stablehlo has no families: leave out family={family!r}")
    if shard_gb is not None and to != "hf":
        raise UserError(f"{to} keeps its weights in one file: leave out shard_gb={shard_gb}")
    if shard_gb is not None and not 0 < shard_gb < math.inf:
        raise UserError(f"shard_gb={shard_gb} is no size of a file: give gigabytes, such as 5")
    if out.exists():
        raise UserError(f"{out} exists: give another folder, or remove it first")
    return STACKS[to]


def check_kind(to: str, config: ModelConfig) -> None:
    """Raise UserError for a model of a kind that no table of `to` is for."""
    transformers = "decoder", "encoder", "encoder_decoder"
    kinds = transformers if to == "hf" else ("decoder",)
    if config.kind not in kinds:
        other = "hf, " if config.kind in transformers else ""
        raise UserError(
            f"model.kind={config.kind} cannot be exported to {to}, which has no such models: use "
            f"{other}the run itself by jaxlm.load, or a model of kind {' or '.join(kinds)}"
        )
    if config.labels is not None and to != "hf":
        raise UserError(
            f"a classifier (model.labels) cannot be exported to {to}, which takes language models: "
            "use hf"
        )


def _write(model: Model, to: str, folder: Path, dtype: str, table, shard_gb: float) -> Path:
    """Write all files; returns the path that the other stack is given."""
    if to == "stablehlo":
        write_stablehlo(folder, model, dtype)
        write_tokenizer(model.tokenizer, folder, model.config.max_seq_len)
        return folder
    if to == "hf":
        write_model(folder, table, model, dtype, int(shard_gb * 1e9))
        return folder
    settings = table.config_to_theirs(model.config)
    tensors = table.to_theirs(model.params, model.config)
    write_gguf(folder / GGUF_FILE, settings, tensors, model.tokenizer, dtype)
    return folder / GGUF_FILE


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, removed where anything fails."""
    draft = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "has no space left" if full else f"cannot be written to ({error.strerror})"
        raise UserError(f"{out.parent} {what}: nothing was kept; give another --out") from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
