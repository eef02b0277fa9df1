"""`python -m jaxlm.check --meshes="dp8;fsdp8;dp2,tp4"`: do the numbers depend on the mesh?

Runs the training step of the config's own model on every mesh and on one device, in float32 at the
highest precision of matrix products, with random parameters and random packed documents, and
compares: initial parameters and batches bit for bit; loss and every gradient to rounding.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from jaxlm.axes import MESH_AXES, OPEN, format_mesh, parse_mesh
from jaxlm.cli import parse_config, run_command
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.mesh import batch_shards, enable_compilation_cache, make_mesh
from jaxlm.misfit import check_fits
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import param_shapes
from jaxlm.parity import STEPS, TOLERANCE, Row, compare, measure
from jaxlm.picture import picture, stack_pictures
from jaxlm.sharding import split_boxes

SHRUNK_VOCABULARY = 1024
LABELS = ("negative", "neutral", "positive")  # where the config leaves them to the data
# Of these, those that fit the model. The open axis takes what is left of 8 virtual CPU devices, or
# of the machine's GPUs.
MESHES = ("dp", "fsdp", "dp,fsdp2,tp2", "pp2,dp,tp2", "cp4,dp", "ep2,tp2,dp")
VIRTUAL_DEVICES = 8


def main(argv: list[str]) -> int:
    """Check, print, and return the exit code: 0 if all meshes agree with one device, else 1."""
    config, arguments = parse_config(
        argv,
        command="jaxlm.check",
        description="Compare the training step on every mesh with one device's: initial "
        "parameters, batches, loss, gradients. Random parameters and documents, in float32.",
        add_arguments=_add_arguments,
    )
    options = vars(arguments)
    config = _for_checking(config, _number(options, "width"))
    meshes = _meshes(options.get("meshes"), config)
    asked, rows = config.train.batch_size, _number(options, "rows")
    config = _with_rows(config, meshes, rows)
    say(_batch_line(config.train.batch_size, asked if rows is None else None))
    if "draw" in options:
        _draw(options["draw"], config, list(meshes.values()))
        return 0
    enable_compilation_cache()
    audited = options.get("collectives", False)
    one = measure(config, _one_device(next(iter(meshes.values()))), "dp1", report=say)
    rows = [compare(measure(config, m, n, audited, say), one) for n, m in meshes.items()]
    reference = compare(one, one)
    if options.get("json", False):
        print(json.dumps(_as_json(config, reference, rows), indent=2))
    else:
        print(_table(reference, rows))
        if audited:
            print("\n".join(audit_lines(row) for row in rows))
    wrong = [row for row in rows if row.failures]
    for row in wrong:
        say(f"{row.mesh} is not as one device: {row.failures[0]}")
    return 1 if wrong else 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("check")
    group.add_argument(
        "--meshes",
        metavar="LIST",
        help='meshes to compare with one device: "dp8;fsdp4,tp2"; left '
        "out: the config's mesh, or, where that is left out too, several that fit the model",
    )
    group.add_argument(
        "--width",
        metavar="N",
        help="shrink the model to this d_model: widths of heads, "
        "feed-forward and experts in proportion, the vocabulary to at most "
        f"{SHRUNK_VOCABULARY}; layers, heads and experts stay (rows too: --model.max_seq_len)",
    )
    group.add_argument(
        "--rows",
        metavar="N",
        help="train.batch_size; left out: the fewest rows that all meshes can split",
    )
    group.add_argument(
        "--draw",
        metavar="FILE.svg",
        help="compute nothing; draw which part of which array each device of the meshes holds",
    )
    group.add_argument("--json", action="store_true", help="machine-readable output")
    group.add_argument(
        "--collectives",
        action="store_true",
        help="also what each compiled step sends: kind, mesh axes, count, bytes per device",
    )


def _draw(path: str, config: Config, meshes: list[Mesh]) -> None:
    if not path.endswith(".svg"):
        raise UserError(f"--draw={path} is not the name of an SVG file: give one such as mesh.svg")
    boxed = param_shapes(config.model)
    batch = config.train.batch_size, config.seq_len
    pictures = [picture(*split_boxes(boxed), batch, mesh) for mesh in meshes]
    try:
        Path(path).expanduser().write_text(stack_pictures(pictures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--draw={path} cannot be written ({error.strerror})") from None
    say(f"drawn: {path}")


def _for_checking(config: Config, width: int | None) -> Config:
    """The config in float32, at the peak learning rate from the first step, shrunk if asked."""
    model = config.model
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or config.tokenizer.vocab_size,
        dtype="float32",
        attention="auto" if model.attention == "cudnn" else model.attention,
        labels=model.labels or (LABELS if config.task == "classification" else None),
    )
    if width is not None:
        model = shrink(model, width)
    optim = dataclasses.replace(config.optim, warmup_steps=0)
    say(
        f"{model.num_layers} layers of width {model.d_model}, vocabulary {model.vocab_size}, rows "
        f"of {config.seq_len} tokens; float32, no warm-up"
    )
    return dataclasses.replace(config, model=model, optim=optim)


def shrink(model: ModelConfig, width: int) -> ModelConfig:
    """The model with `d_model` = `width` and all other widths in proportion.

    What a mesh has to divide stays: layers, heads, experts, the length of rows. Raises UserError.
    """
    if not 0 < width < model.d_model:
        raise UserError(
            f"--width={width} does not shrink model.d_model={model.d_model}: give less, or leave "
            "--width out"
        )

    vocab_size = min(model.vocab_size, SHRUNK_VOCABULARY)
    if model.is_recurrent:
        return dataclasses.replace(model, d_model=width, vocab_size=vocab_size)

    def scaled(size: int | None, multiple: int) -> int | None:
        if not size:
            return size
        return multiple * max(1, round(size * width / model.d_model / multiple))

    experts = model.experts and dataclasses.replace(
        model.experts,
        d_ff=scaled(model.experts.d_ff, 8),
        d_shared=scaled(model.experts.d_shared, 8),
    )
    return dataclasses.replace(
        model,
        d_model=width,
        head_dim=scaled(model.head_size, 2),
        d_ff=scaled(model.d_ff, 8),
        experts=experts,
        vocab_size=vocab_size,
    )


def _meshes(text: str | None, config: Config) -> dict[str, Mesh]:
    """The meshes asked for by name, or those of the usual ones that fit. Raises UserError."""
    usual = Config.__dataclass_fields__["mesh"].default
    if text is None and config.mesh != usual:
        text = config.mesh
    if text is not None and not all(part.strip() for part in text.split(";")):
        raise UserError(f"--meshes={text!r} has an empty mesh: write them as dp8;fsdp4,tp2")
    names = MESHES if text is None else [part.strip() for part in text.split(";")]
    devices = [math.prod(n for n in parse_mesh(name).values() if n != OPEN) for name in names]
    most = max(devices) if text else VIRTUAL_DEVICES
    # Virtual devices can only be asked for once: for the largest mesh.
    if jax.config.jax_num_cpu_devices < most:
        _try(jax.config.update, "jax_num_cpu_devices", most)
    meshes = [_try(make_mesh, name) if text is None else make_mesh(name) for name in names]
    meshes = {
        name if OPEN not in parse_mesh(name).values() else format_mesh(mesh.shape): mesh
        for name, mesh in zip(names, meshes, strict=True)
        if mesh is not None
    }
    if text is not None:
        return meshes
    fitting = {n: m for n, m in meshes.items() if _try(_with_rows, config, {n: m}, None)}
    fitting.pop("dp1", None)
    if not fitting:
        raise UserError("there is one device to check on: set JAX_PLATFORMS=cpu for virtual ones")
    return fitting


def _try(function: Callable, *args):
    """The function's result, or None where it raises what a machine or a model may not have."""
    try:
        return function(*args)
    except (UserError, RuntimeError):
        return None


def _with_rows(config: Config, meshes: dict[str, Mesh], rows: int | None) -> Config:
    """The config with `rows` in a batch, or the fewest that all meshes split. Raises UserError."""
    unit = config.train.fewest_parts * math.lcm(*(batch_shards(m) for m in meshes.values()))
    for count in [rows] if rows else range(unit, 64 * unit + 1, unit):
        train = dataclasses.replace(config.train, batch_size=count)
        candidate = dataclasses.replace(config, train=train)
        wrong = None
        for name, mesh in meshes.items():
            try:
                check_fits(candidate, mesh)
            except UserError as error:
                wrong = UserError(f"{name}: {error}")
        if wrong is None:
            return candidate
    raise wrong


def _batch_line(rows: int, asked: int | None) -> str:
    """How many rows there are, and why not as many as `asked`, if that is given."""
    if asked in (None, rows):
        return f"batches of {rows} rows"
    return (
        f"batches of {rows} rows, the fewest that every mesh splits, not train.batch_size={asked}; "
        f"for those, if the meshes split them, give --rows={asked}"
    )


def _one_device(mesh: Mesh) -> Mesh:
    sizes = (1,) * len(MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=mesh.devices.flat[:1])


def _table(reference: Row, rows: list[Row]) -> str:
    """One line a mesh, one device first."""
    heads = ["mesh", "parameters", "batch", "loss diff", "gradient diff", "largest in", "norm"]
    lines = [[*heads, *(f"loss {step + 1}" for step in range(STEPS)), ""]]
    for row in [reference, *rows]:
        is_reference = row is reference
        lines.append(
            [
                row.mesh,
                row.parameters,
                row.batch,
                "" if is_reference else f"{row.loss_differences[0]:.1e}",
                "" if is_reference else f"{row.gradient_difference:.1e}",
                "" if is_reference else row.gradient_parameter,
                f"{row.gradient_norm:.4f}",
                *(f"{loss:.5f}" for loss in row.losses),
                "one device" if is_reference else "DIFFERS" if row.failures else "same",
            ]
        )
    return aligned(lines)


def audit_lines(row: Row) -> str:
    """What a compiled step sends, as a table."""
    lines = [["collective", "axes", "count", "bytes"]]
    for sent in row.collectives:
        count = f"{sent.count:,}" + ("" if sent.is_exact else " (loops of unknown length)")
        lines.append([sent.kind, ",".join(sent.axes), count, f"{sent.bytes:,}"])
    return f"\n{row.mesh}: sent by one step, for one device\n{aligned(lines)}"


def aligned(lines: list[list[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _as_json(config: Config, reference: Row, rows: list[Row]) -> dict:
    return {
        "agrees": not any(row.failures for row in rows),
        "tolerance": TOLERANCE,
        "rows": config.train.batch_size,
        "reference": dataclasses.asdict(reference),
        "meshes": [dataclasses.asdict(row) for row in rows],
    }


def _number(options: dict, name: str) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--{name}={text!r} is not a number above 0: give one such as 64")
    return int(text)


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
