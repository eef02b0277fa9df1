"""What model a folder holds: a run, one of its steps, or a folder of Hugging Face transformers."""

import dataclasses
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxlm.checkpoint import CONFIG, METRICS, restore_params
from jaxlm.cli import read_config
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.export.huggingface import (
    Model,
    is_model_folder,
    read_model_config,
    read_params,
    read_tokenizer,
)
from jaxlm.mesh import make_mesh
from jaxlm.models.build import make_model
from jaxlm.run_folder import find_step
from jaxlm.sharding import make_layout, split_boxes
from jaxlm.tokenizer import Tokenizer, load_tokenizer

# Rows of what is fine-tuned are not as long as a model's context unless the user says so.
MOST_TOKENS = 1024
FACTS = ("step", "tokens", "valid_loss", "valid_perplexity", "valid_bits_per_byte")


def find_model(path: str | Path, step: str = "last") -> Path:
    """The folder of a model: `path` itself, or the step of the run that `path` is.

    Raises UserError where there is none, or a `step` is asked of what is no run.
    """
    path = Path(path).expanduser()
    if not is_model_folder(path):
        return find_step(path, step)
    if step != "last":
        raise UserError(f"{path} is a model without steps: leave out step={step}")
    return path


def read_description(folder: Path) -> tuple[Config, Tokenizer, list[int]]:
    """What model a folder of `find_model` holds, its tokenizer, and what its texts start with."""
    if not is_model_folder(folder):
        tokenizer = load_tokenizer(folder)
        return read_config(folder / CONFIG), tokenizer, [tokenizer.bos_id]
    model = read_model_config(folder)
    tokenizer = read_tokenizer(folder, model)
    return Config(model=model), tokenizer, tokenizer.prefix


def load_params(path: str | Path, model, mesh: Mesh, average: bool = True):
    """The parameters of a model's folder for `model`, stacked, as they are stored on `mesh`.

    Of a run that kept an average of its parameters that is taken, unless `average` is false. A
    folder whose parameters have other names or shapes is a UserError.
    """
    folder = find_model(path)
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    order = model.schedule.order(model.config.num_layers)
    layout = make_layout(*split_boxes(boxed), mesh, order)
    if is_model_folder(folder):
        return layout.to_stored(read_params(folder, model.config, layout.exact))
    averaged = average and read_config(folder / CONFIG).optim.ema_decay is not None
    return layout.to_stored(restore_params(folder, layout.exact, "ema" if averaged else "params"))


def starting_point(path: str) -> dict:
    """The settings that a run starting from the model in `path` has where it gives no others."""
    folder = find_model(path)
    config, tokenizer, _ = read_description(folder)
    longest = config.model.max_seq_len
    return {
        "model": dataclasses.asdict(config.model),
        "tokenizer": {"kind": "file", "path": str(folder / tokenizer.file_name)},
        "data": {
            "seq_len": config.data.seq_len or (MOST_TOKENS if longest > MOST_TOKENS else None)
        },
    }


def read_model(folder: Path, average: bool = True) -> Model:
    """The model in a folder of `find_model`, on one device, for export."""
    config, tokenizer, prefix = read_description(folder)
    model = dataclasses.replace(
        config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size
    )
    params = load_params(folder, make_model(model), make_mesh("dp1"), average)
    name, facts = folder.resolve().name, {"source": folder.name}
    if not is_model_folder(folder):
        name = folder.resolve().parent.parent.name
        figures = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        facts = {key: figures[key] for key in FACTS if key in figures}
    return Model(name, model, params, tokenizer, prefix, facts)
