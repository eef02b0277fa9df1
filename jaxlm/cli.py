"""Command lines and YAML files to one checked `Config`; nothing is ignored or guessed.

Layers, later over earlier: the defaults, the preset's model fields, the YAML file, the command
line. Errors are one sentence with the key, the value and the nearest right one.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from jaxlm.config import Config
from jaxlm.data_config import DROPOUT
from jaxlm.errors import NonFiniteError, UserError, nearest, show
from jaxlm.mistakes import dataclass_in, is_union, leaves, nearest_key, origins, sentence_of
from jaxlm.model_config import ModelConfig
from jaxlm.presets import PRESETS
from jaxlm.yaml_file import Loader, dump_yaml, read_yaml

EXIT_USER_ERROR, EXIT_NONFINITE, EXIT_PREEMPTED, EXIT_LOST = 2, 3, 75, 76
EXIT_INTERRUPTED = 130


def parse_config(
    argv: list[str],
    command: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    read_start: Callable[[str], dict] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The experiment that `argv` asks for, and the command's own arguments.

    `command` is the module's name as the user types it; `add_arguments` adds what only this
    command takes; `read_start(init_from)` is the layer that lies under the others. Prints and
    exits for `--help` and `--print_config`. Raises UserError.
    """
    parser = _parser(command, description)
    if add_arguments is not None:
        add_arguments(parser)
    known = parser.parse_args(argv)
    arguments = vars(known)
    path = arguments.pop("config", None)
    if path == "":
        raise UserError("--config= is empty: give a YAML file, or leave it out")
    path = path and os.path.expanduser(path)
    printing = arguments.pop("print_config", False)
    keys = dict(leaves(Config))
    overrides = {}
    for key in [k for k in arguments if k in keys]:
        _set(overrides, key, _read_value(key, arguments.pop(key), keys[key]))
    layers = read_yaml(Path(path)) if path else {}
    start = overrides.get("init_from", layers.get("init_from"))
    below = read_start(os.path.expanduser(start)) if read_start and start else None
    config = build_config(layers, overrides, source=path, below=below)
    if config.out is None:
        config = dataclasses.replace(config, out=f"runs/{Path(path).stem if path else 'default'}")
    if printing:
        print(dump_config(config), end="")
        sys.exit(0)
    return config, known


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage above it."""

    def parse_args(self, args=None, namespace=None):
        """As argparse does; the error for an unknown option names the nearest."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(_unknown_argument(unknown[0], self))
        return known

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


class _Once(argparse.Action):
    """Store an option's value, and refuse a second one."""

    def __call__(self, parser, namespace, values, option_string=None):
        if hasattr(namespace, self.dest):
            raise UserError(f"{option_string} is given twice: give it once")
        setattr(namespace, self.dest, values)


def run_command(main: Callable[[list[str]], int | None]) -> typing.NoReturn:
    """Run `main(argv)` as a process: one sentence for a user's mistake, and the exit code."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see jaxlm/__init__.py
    try:
        code = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        if (known := explain(error)) is None:
            raise
        sentence, code = known
        if sentence:
            print(sentence, file=sys.stderr)
        _leave(code)
    sys.exit(code or 0)


def _leave(code: int) -> typing.NoReturn:
    """End the process at once: where devices still compute, an interpreter that ends crashes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def explain(error: BaseException) -> tuple[str, int] | None:
    """One sentence and the exit code for an error that is no fault of the program's, or None."""
    if isinstance(error, UserError):
        return f"error: {error}", EXIT_USER_ERROR
    if isinstance(error, ValidationError):  # of a config put together from several sources
        return f"error: {sentence_of(error.errors())}", EXIT_USER_ERROR
    if isinstance(error, NonFiniteError):
        return f"stopped: {error}", EXIT_NONFINITE
    # JAX's, known by its text: importing JAX here would be slow.
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"error: {_out_of_memory(str(error))}", EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "", EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "", 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"error: no space left on the disk ({error.filename or 'while writing'}); what was "
            "complete is intact: free some and run the same command again"
        ), EXIT_USER_ERROR
    return None


def _out_of_memory(text: str) -> str:
    asked = re.search(r"allocat\D*(\d+) ?(?:bytes|B)", text)
    size = f" ({int(asked[1]) / 2**30:.1f} GiB were asked for)" if asked else ""
    return (
        f"out of device memory{size}: lower train.batch_size or raise train.accumulation, set "
        "model.remat=full, or shard by fsdp"
    )


def build_config(
    file: dict,
    overrides: dict | None = None,
    source: str | None = None,
    below: dict | None = None,
) -> Config:
    """Merge a YAML file's mapping and the overrides over the preset, and check the whole.

    `below` stands in for a preset that neither names, and for sections that neither has. Raises
    UserError, naming `source` for what stands in the file.
    """
    overrides = overrides or {}
    in_source = f"in {source}" if source else ""
    for layer in (file, overrides):
        if not isinstance(layer.get("model", {}), dict):
            where = f" ({in_source})" if source else ""
            raise UserError(
                f"model={show(layer['model'])}{where}: give its fields, one a line, indented"
            )
    in_file, in_line = file.get("model", {}), overrides.get("model", {})
    default = ModelConfig.__dataclass_fields__["preset"].default
    preset = in_line.get("preset", in_file.get("preset", default))
    if not isinstance(preset, str) or preset not in PRESETS:
        sentence = (
            f"model.preset={preset!r} is not known"
            f"{nearest(str(preset), PRESETS) or ' (presets: ' + ', '.join(PRESETS) + ')'}"
        )
        raise UserError(sentence + origins(sentence, [("", overrides), (in_source, file)]))
    fields = PRESETS[preset] or ModelConfig.__dataclass_fields__.keys() - {"preset"}
    if in_line.get("preset", in_file.get("preset")) != in_file.get("preset") and set(fields) <= set(
        in_file
    ):
        raise UserError(
            f"model.preset={preset!r} would have no effect, because {source} sets every field of "
            "that preset itself: take them out of the file"
        )
    base = {"model": dict(PRESETS[preset])}
    if below is not None:
        chosen = "preset" in in_file or "preset" in in_line
        dropped = {"model"} if chosen else set()
        if any(_names_tokenizer(layer.get("tokenizer", {})) for layer in (file, overrides)):
            dropped.add("tokenizer")
        below = {key: value for key, value in below.items() if key not in dropped}
        base |= below
    merged = _merge(_merge(base, file), overrides)
    try:
        # As JSON: pydantic's strict mode takes mappings for dataclasses only there.
        return TypeAdapter(Config).validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        sentence = sentence_of(error.errors())
        start = overrides.get("init_from", file.get("init_from"))
        layers = [("", overrides), (in_source, file), (f"of init_from={start}", below or {})]
        raise UserError(sentence + origins(sentence, layers)) from None


def read_config(path: Path) -> Config:
    """The experiment in a YAML file, such as a run folder's config.yaml. Raises UserError."""
    return build_config(read_yaml(path), source=str(path))


def dump_config(config: Config) -> str:
    """The experiment as YAML that `read_config` reads back to an equal one."""
    return dump_yaml(_plain(dataclasses.asdict(config)))


def flatten(config: Config) -> dict[str, object]:
    """Every leaf of the experiment by its dotted key."""
    return {key: _get(config, key) for key, _ in leaves(Config)}


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=f"python -m {command}",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        usage="%(prog)s [--config=FILE.yaml] [--KEY=VALUE ...]",
    )
    parser.add_argument(
        "--config", action=_Once, metavar="FILE", help="YAML file over the defaults"
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the merged experiment as YAML and exit"
    )
    sections: dict[str, argparse._ArgumentGroup] = {}
    for key, hint in leaves(Config):
        section, _, _ = key.rpartition(".")
        if section and section not in sections:
            sections[section] = parser.add_argument_group(section, _doc(section))
        group = sections.get(section, parser)
        group.add_argument(f"--{key}", action=_Once, metavar=_metavar(hint), help=_help(key))
    return parser


def _field(key: str):
    """The pydantic field behind a dotted key."""
    kind, *_ = [Config]
    *sections, name = key.split(".")
    for section in sections:
        kind = dataclass_in(typing.get_type_hints(kind)[section])
    return kind.__pydantic_fields__[name]


def _doc(section: str) -> str:
    hint = typing.get_type_hints(Config)
    for name in section.split("."):
        kind = dataclass_in(hint[name])
        hint = typing.get_type_hints(kind)
    return kind.__doc__.strip()


def _help(key: str) -> str:
    field = _field(key)
    default = _yaml_inline(field.default)
    return f"{field.description or 'section'} [{default}]".replace("%", "%%")


def _yaml_inline(value) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _metavar(hint) -> str:
    """What a value looks like: the choices, or the type's name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if is_union(hint):
        return _metavar(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return "LIST"
    return {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}.get(hint, "YAML")


def _holds_text(hint) -> bool:
    """Whether a field holds text, words or a list of such."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_union(hint):
        return _holds_text(next(a for a in arguments if a is not type(None)))
    return (
        hint is str or origin is typing.Literal or (origin is tuple and _holds_text(arguments[0]))
    )


def _read_value(key: str, text: str, hint) -> object:
    """A command-line value: text stays as it is where the field holds text, else it is YAML."""
    is_list = _metavar(hint) == "LIST" and text.startswith("[")
    if _holds_text(hint) and not is_list:
        return None if text == "null" else text
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise UserError(f"--{key}={text!r} is not valid YAML") from None


def _unknown_argument(argument: str, parser: argparse.ArgumentParser) -> str:
    name = argument.split("=")[0]
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [a for inner in action.choices.values() for a in inner._actions]
    options = [o.lstrip("-") for action in actions for o in action.option_strings]
    if not name.startswith("-"):
        return f"argument {argument!r} is not understood: options are written --KEY=VALUE"
    return f"unknown option {name!r}{nearest_key(name.lstrip('-'), options, '--')}"


def _names_tokenizer(settings: object) -> bool:
    """Whether settings of a tokenizer say which one it is, and not only how it is used."""
    return not isinstance(settings, dict) or not settings.keys() <= {*DROPOUT}


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _set(tree: dict, key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _get(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _plain(value):
    """Tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
