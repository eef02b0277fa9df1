"""What model a folder holds: a run, one of its steps, or a folder of Hugging Face transformers."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.base import read_base
from jaxlm.checkpoint import (
    CONFIG,
    METRICS,
    complete_steps,
    restore_arrays,
    restore_params,
    step_folder,
)
from jaxlm.cli import read_config
from jaxlm.config import Config
from jaxlm.decode import build_decode_program
from jaxlm.decode_ngram import NgramProgram
from jaxlm.decode_params import as_computed
from jaxlm.errors import UserError, show
from jaxlm.export.huggingface import (
    is_model_folder,
    read_model_config,
    read_params,
    read_tokenizer,
)
from jaxlm.export.model import Model, text_ends
from jaxlm.mesh import make_mesh
from jaxlm.model_config import ModelConfig
from jaxlm.models import lora
from jaxlm.models.build import make_model, param_shapes
from jaxlm.models.head import HEADS, LABEL_HEAD, POOLER
from jaxlm.models.ngram import Ngram
from jaxlm.run_folder import find_step
from jaxlm.sharding import Layout, make_layout, path_name, split_boxes
from jaxlm.tokenizer import Tokenizer, load_tokenizer

# Rows of what is fine-tuned are not as long as a model's context unless the user says so.
MOST_TOKENS = 1024
# What the shapes of a model's parameters follow from, beside `max_seq_len` of learned positions.
SIZES = ("d_model", "num_layers", "encoder_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff")
SIZES += ("vocab_size", "experts")
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


def read_description(folder: Path) -> tuple[Config, Tokenizer, tuple[list[int], list[int]]]:
    """What model a folder of `find_model` holds, its tokenizer, and what its texts start and, of a
    classifier, end with; of a translator, what its translations start with."""
    if is_model_folder(folder):
        model = read_model_config(folder)
        config = Config(task=_task_of(model), model=model)
        tokenizer = read_tokenizer(folder, model)
        prefix, suffix = tokenizer.prefix, tokenizer.suffix
    else:
        config, tokenizer = read_config(folder / CONFIG), load_tokenizer(folder)
        # Float8 is for training: in use, a text's numbers must not depend on those beside it.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, float8=False))
        prefix, suffix = tokenizer.ends
    if config.task == "classification":
        return config, tokenizer, (prefix, suffix)
    is_published = is_model_folder(folder) and config.task != "translation"
    return config, tokenizer, (prefix if is_published else [tokenizer.bos_id], [])


def _task_of(model: ModelConfig) -> str:
    """What a model of transformers is for."""
    if model.kind == "encoder_decoder":
        return "translation"
    reads_only = model.kind == "encoder" or model.labels is not None
    return "classification" if reads_only else "language_modelling"


def load_program(folder: Path, config: Config, mesh: Mesh, average_last: int | None = None):
    """What generates and scores with the model in a folder of `find_model`, and its parameters in
    the form that this takes."""
    if config.model.kind == "ngram":
        if mesh.size > 1 or average_last is not None:
            raise UserError(
                f"{folder} holds an N-gram model, which has one checkpoint and no use for several "
                "devices: leave out mesh and average_last"
            )
        return NgramProgram(config.model.max_seq_len), Ngram.from_arrays(
            restore_arrays(folder), config.model.order, config.model.vocab_size
        )
    model = make_model(config.model)
    program = build_decode_program(model, mesh)
    params = load_params(folder, model, mesh, average_last=average_last, dtype=model.dtype)
    return program, program.prepare(params, consume=True)


def load_params(
    path: str | Path,
    model,
    mesh: Mesh,
    average: bool = True,
    average_last: int | None = None,
    dtype: jnp.dtype = jnp.float32,
):
    """The parameters of a model's folder for `model`, stacked, as they are stored on `mesh`.

    Of a run that kept an average of its parameters that is taken, unless `average` is false. With
    `average_last`, the mean over that many checkpoints of a run, the last of them `path`'s, of the
    parameters themselves (Vaswani et al., 2017), in float32 and one at a time. Adapters are merged
    into the model they belong to. Matrices of a folder of transformers are cast to `dtype` as they
    are read; a run's stay float32. A folder whose parameters have other names or shapes is a
    UserError, and so are too few checkpoints.
    """
    folder = find_model(path)
    layout = _layout(model, mesh)
    if average_last is None:
        targets = as_computed(layout.exact, dtype) if is_model_folder(folder) else layout.exact
        return layout.to_stored(_read(folder, model.config, targets, average))
    mean = None
    for count, step in enumerate(_last_steps(folder, average_last), 1):
        params = _read(find_step(step), model.config, layout.exact, average=False)
        mean = params if mean is None else _closer(mean, params, jnp.float32(count))
    return layout.to_stored(mean)


def start_params(
    path: str | Path, model, mesh: Mesh, seed: int, say: Callable[[str], None] = lambda line: None
):
    """Like `load_params`, to train on: a classifier of labels that the folder's model does not
    have is drawn from the seed, as in a fresh model, and the head in its place there is left out.
    The pooler of an encoder of transformers, which was trained with it, is kept.

    `say` gets a line on what is loaded and what is new.
    """
    folder = find_model(path)
    own, _, _ = read_description(folder)
    layout = _layout(model, mesh)
    labels = model.config.labels
    new = LABEL_HEAD if labels is not None and labels != own.model.labels else None
    known = {name: part for name, part in layout.exact.items() if name != new}
    if new and is_model_folder(folder) and own.model.pooler and model.config.pooler:
        known[new] = {POOLER: layout.exact[new][POOLER]}
    _check_sizes(folder, own.model, model.config, known)
    params = _read(folder, model.config, known)
    added = ""
    if new is not None:
        missing = {n: s for n, s in layout.exact[new].items() if n not in known.get(new, {})}
        shardings = jax.tree.map(lambda s: s.sharding, missing)
        key = jax.random.key(seed)

        def draw():
            fresh = split_boxes(model.init(key))[0][new]
            return {name: fresh[name] for name in missing}

        params[new] = params.get(new, {}) | jax.jit(draw, out_shardings=shardings)()
        shapes = jax.tree_util.tree_leaves_with_path({new: missing})
        added = "; new: " + ", ".join(f"{path_name(path)} {leaf.shape}" for path, leaf in shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(known))
    say(f"init_from: {count:,} parameters from {folder}{added}")
    return layout.to_stored(params)


def _check_sizes(folder: Path, own: ModelConfig, wanted: ModelConfig, known: dict) -> None:
    """Raise UserError where a parameter in `known`, of the model that is wanted, has another shape
    in the folder's own."""
    ours, theirs = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (known, split_boxes(param_shapes(own))[0])
    )
    sizes = (*SIZES, "max_seq_len") if own.positions == "learned" else SIZES
    differences = ", ".join(
        f"model.{name}={show(there)} there, {show(here)} now"
        for name in sizes
        if (there := getattr(own, name)) != (here := getattr(wanted, name))
    )
    if differences and any(theirs.get(name, shape) != shape for name, shape in ours.items()):
        raise UserError(
            f"init_from={folder} holds a model of other sizes ({differences}): leave that out"
        )


def _layout(model, mesh: Mesh) -> Layout:
    boxed = param_shapes(model.config)
    return make_layout(*split_boxes(boxed), mesh, model.schedule.order(model.config.num_layers))


def _read(folder: Path, config: ModelConfig, targets: dict, average: bool = True) -> dict:
    """The parameters that `targets` names, in logical shapes, laid out as it says.

    A head that a classifier does not name may be there.
    """
    if is_model_folder(folder):
        own = read_model_config(folder)
        kept = {"labels": own.labels, "pooling": own.pooling, "pooler": own.pooler}
        return read_params(folder, dataclasses.replace(config, **kept), targets)
    run = read_config(folder / CONFIG)
    key = "ema" if average and run.optim.ema_decay is not None else "params"
    # A classifier names no vocabulary's head, and what predicts hidden tokens no classifier's.
    spare = HEADS if config.labels is not None or config.kind == "encoder" else ()
    if run.lora is None:
        return restore_params(folder, targets, key, spare)
    return _read_merged(folder, run, targets, key, spare)


def _read_merged(folder: Path, run: Config, targets: dict, key: str, spare: tuple[str, ...]):
    """Like `_read`, of a checkpoint of adapters."""
    seed = jax.random.key(0)
    boxed = param_shapes(run.model)
    draw = functools.partial(lora.init_adapters, run.lora, boxed, seed)
    mesh = jax.tree.leaves(targets)[0].sharding.mesh
    adapters = make_layout(*split_boxes(jax.eval_shape(draw)), mesh).exact
    trained, frozen = lora.divide(run, targets)
    trained = restore_params(folder, lora.joined(trained, adapters), key, spare)
    frozen = _read(Path(read_base(folder).folder), run.model, frozen)
    shardings = jax.tree.map(lambda s: s.sharding, targets)
    return jax.jit(
        functools.partial(lora.merge, run.lora), out_shardings=shardings, donate_argnums=0
    )(frozen, trained)


def _last_steps(folder: Path, count: int) -> list[Path]:
    """The step folders of a run, the newest `count` of those up to `folder`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"average_last={count!r} is wrong: it should be a whole number above 0")
    if is_model_folder(folder):
        raise UserError(f"{folder} is a model without steps: leave out average_last={count}")
    run = folder.absolute().parent.parent
    steps = [step_folder(run, step) for step in complete_steps(run)]
    steps = [step for step in steps if step.name <= folder.name]
    if len(steps) < count:
        raise UserError(
            f"average_last={count} is more checkpoints than the {len(steps)} that {run} has "
            f"complete up to {folder.name}: use at most that, or keep more (checkpoint.keep, "
            "checkpoint.every_steps)"
        )
    return steps[-count:]


@functools.partial(jax.jit, donate_argnums=0)
def _closer(mean, params, count):
    """The mean of `count` trees from that of all before the last, and the last."""
    return jax.tree.map(lambda m, x: m + (x - m) / count, mean, params)


def starting_point(path: str) -> dict:
    """The settings that a run starting from the model in `path` has where it gives no others."""
    folder = find_model(path)
    config, _, _ = read_description(folder)
    longest = config.model.max_seq_len
    return {
        "task": config.task,
        "model": dataclasses.asdict(config.model),
        "tokenizer": {"kind": "file", "path": str(folder)},
        "data": {
            "seq_len": config.data.seq_len or (MOST_TOKENS if longest > MOST_TOKENS else None)
        },
    }


def read_model(folder: Path, average: bool = True, average_last: int | None = None) -> Model:
    """The model in a folder of `find_model`, on one device, for export; see `load_params`."""
    config, tokenizer, _ = read_description(folder)
    model = dataclasses.replace(
        config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size
    )
    params = load_params(folder, make_model(model), make_mesh("dp1"), average, average_last)
    name, facts = folder.resolve().name, {"source": folder.name}
    if not is_model_folder(folder):
        name = folder.resolve().parent.parent.name
        figures = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        facts = {key: figures[key] for key in FACTS if key in figures}
        if average_last is not None:  # which no validation has seen
            facts = {"step": figures["step"], "average_last": average_last}
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    if not is_model_folder(folder):
        prefix, suffix = text_ends(model, tokenizer)
    return Model(name, model, params, tokenizer, prefix, facts, suffix)
