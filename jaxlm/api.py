"""Models from one's own code: `load` and `export_checkpoint`; what they do is in `texts`."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.decode import DecodeProgram
from jaxlm.decode_ngram import NgramProgram
from jaxlm.errors import UserError
from jaxlm.export import family_of
from jaxlm.export.expected import expected_of
from jaxlm.export.exporter import check_kind, check_target, export_model
from jaxlm.export.huggingface import is_model_folder, read_settings
from jaxlm.export.safetensors import read_tensors
from jaxlm.export.verify import PLAIN, TRANSFORMERS, Verification, verify
from jaxlm.loading import find_model, load_program, read_description, read_model
from jaxlm.mesh import folded_mesh, make_mesh
from jaxlm.misfit import check_fits
from jaxlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A trained model on a mesh, ready to generate and score. Made by `load`."""

    config: Config
    tokenizer: Tokenizer
    program: DecodeProgram | NgramProgram
    params: object
    """In the form `program` takes."""
    prefix: tuple[int, ...]
    """Ids that a text starts with: beginning-of-text, unless the model was trained without."""
    source: Path
    """The folder the parameters are from: a run's step or a Hugging Face folder."""
    average_last: int | None = None
    """They are the mean over so many checkpoints, that step the last; None: they are one's."""
    suffix: tuple[int, ...] = ()
    """Ids that a text to be classified ends with."""

    def __repr__(self) -> str:
        where = f"step {self.step} of {self.source}" if self.step else self.source
        return f"<LanguageModel: {self.config.model.kind}, {where}>"

    def check_says_something(self) -> None:
        """Raise UserError for an encoder without labels: it reads texts, and says nothing."""
        model = self.config.model
        if model.kind == "encoder" and model.labels is None:
            raise UserError(
                f"{self.source} is an encoder without labels: fine-tune it first (python -m "
                f"jaxlm.train --task=classification --init_from={self.source})"
            )

    @property
    def step(self) -> int:
        """The update the parameters are from; 0 for a Hugging Face folder."""
        return 0 if is_model_folder(self.source) else int(self.source.name.rpartition("_")[2])


def load(
    path: str | Path,
    mesh: str | Mesh | None = None,
    dtype: str | None = None,
    average_last: int | None = None,
    step: str | int = "last",
):
    """Load a run folder, one of its step folders, or a folder of Hugging Face transformers
    (config.json, safetensors, tokenizer).

    `step` says which checkpoint of a run: "last", the newest sound one, "best" (the lowest
    validation loss) or a number.
    `mesh` is a text such as `"dp2,tp2"` or a Mesh; None is one device. `dtype` ("float32" or
    "bfloat16") is the compute type; None is the run's. Where the run kept an exponential moving
    average of its parameters, that is what is loaded; with `average_last` it is the mean of the
    parameters in so many checkpoints, the last of them `path`'s. Adapters are merged into their
    base. Raises UserError for a path that holds no model, too few checkpoints or a damaged one, and
    a base that moved or changed.
    """
    if not isinstance(path, str | Path) or not isinstance(mesh, str | Mesh | None):
        raise UserError(f"load({path!r}, mesh={mesh!r}): give a path, and a mesh such as 'dp2,tp2'")
    folder = find_model(path, str(step))
    config, tokenizer, (prefix, suffix) = read_description(folder)
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype!r} is not known: use 'float32' or 'bfloat16'")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    mesh = folded_mesh(mesh if isinstance(mesh, Mesh) else make_mesh(mesh or "dp1"))
    check_fits(config, mesh, training=False)
    program, params = load_program(folder, config, mesh, average_last)
    return LanguageModel(
        config,
        tokenizer,
        program,
        params,
        prefix=tuple(prefix),
        source=folder,
        average_last=average_last,
        suffix=tuple(suffix),
    )


def export_checkpoint(
    model: LanguageModel | str | Path,
    to: str = "hf",
    out: str | Path = "exported",
    *,
    dtype: str = "float32",
    family: str | None = None,
    step: str | int = "last",
    average: bool = True,
    average_last: int | None = None,
    shard_gb: float | None = None,
    skip_verification: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Write a model into the new folder `out` for another stack, and verify it there.

    `model` is a run folder, one of its steps, a Hugging Face folder, or a loaded model, whose
    folder is read again. `to` is "hf" (transformers, vLLM, ...), "gguf" (llama.cpp) or
    "stablehlo". `dtype` is that of the weights: "float32", "bfloat16", "float16" or, for GGUF,
    "q8_0". `family` names one of transformers' model types where several can express the model.
    `step` is "last", "best" or a number, `average` takes the moving average of the parameters where
    the run kept one, `average_last` the mean over so many checkpoints, and a file of "hf" weights
    has at most `shard_gb` gigabytes (5). `say` gets lines of progress.

    Returns how the written model compares; `verified` is false only where the other stack is not
    installed or `skip_verification` is set. Raises UserError where it cannot be written, and,
    leaving nothing behind, where it computes something else there.
    """
    if not isinstance(out, str | os.PathLike):
        raise UserError(f"out={out!r} is no folder: give the path of a new one")
    out = Path(out).expanduser()
    check_target(to, dtype, out, family, shard_gb)
    folder = model
    if isinstance(model, LanguageModel):
        folder, average_last = model.source, average_last or model.average_last
    folder = find_model(folder, str(step))
    check_kind(to, read_description(folder)[0].model)
    source = read_model(folder, average, average_last)
    return export_model(
        source,
        to,
        out,
        dtype=dtype,
        family=family,
        shard_gb=shard_gb,
        skip=skip_verification,
        say=say,
    )


def check_import(folder: Path, say: Callable[[str], None]) -> Verification:
    """Verify that a Hugging Face folder computes the same here, and comes back byte for byte.

    Raises UserError where it does not.
    """
    settings = read_settings(folder)
    family = family_of(settings)
    say(f"reading {folder} ({settings['model_type']})")
    model = read_model(folder)
    tensors = family.canonical(read_tensors(folder), model.config)
    for name, values in family.to_theirs(model.params, model.config):
        if values.astype(tensors[name].dtype).tobytes() != tensors[name].tobytes():
            raise UserError(f"tensor {name} of {folder} does not come back as it was")
    say(f"all {len(tensors)} tensors come back byte for byte; comparing with transformers")
    report = verify(TRANSFORMERS, model, folder, "float32", expected_of(model, None), PLAIN)
    if not report.verified and report.prompts:
        raise UserError(f"{folder} computes something else here: {report.reason}")
    return report
