"""What is wrong with a config, in one sentence: which key, where it is from, what is right."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence

from jaxlm.config import Config
from jaxlm.errors import UserError, nearest, show


def sentence_of(errors: list[dict]) -> str:
    """The first of pydantic's errors as one sentence."""
    error = errors[0]
    original = error.get("ctx", {}).get("error")
    if isinstance(original, UserError):
        return str(original)
    path = [str(part) for part in error["loc"]]
    keys = [key for key, _ in leaves(Config)]
    sections = sorted({k.rpartition(".")[0] for k in keys} - {""})
    key, value = ".".join(path), error["input"]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if key in keys:  # in one piece
            section, _, name = key.rpartition(".")
            return f"unknown key {key!r}: in a file {name} stands below {section}:, indented"
        return f"unknown key {key!r}{nearest_key(key, keys + sections)}"
    key = key if key in keys else max((k for k in keys if key.startswith(k)), key=len, default=key)
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return (
            f"{key}={show(value)} is not one of {', '.join(choices)}"
            f"{nearest(str(value).lower(), choices)}"
        )
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    depth = key.count(".") + 1
    words = [
        other["ctx"]["expected"]
        for other in errors
        if other["type"] == "literal_error" and other["loc"][:depth] == error["loc"][:depth]
    ]
    wanted = " or ".join([wanted, *words])
    near = nearest(str(value).lower(), [word.strip("'") for word in words])
    return f"{key}={show(value)} is wrong: it should be {wanted}{near}"


def origins(sentence: str, layers: Sequence[tuple[str, dict]]) -> str:
    """Where the settings that a sentence names are from: the first of `layers` that has each.

    A layer has the name that a sentence has for it, or none where that goes without saying.
    """
    found: dict[str, list[str]] = {}
    unknown = re.findall(r"unknown key '([\w.]+)'", sentence)
    # What a user wrote, in quotes, may look like a setting.
    known = re.findall(r"\w+(?:\.\w+)+|\w+(?==)", re.sub(r"'[^']*'|\"[^\"]*\"", "", sentence))
    for key in dict.fromkeys(unknown + known):
        place = next((name for name, layer in layers if _has(layer, key)), None)
        if place is not None:
            found.setdefault(place, []).append(key)
    if [*found] == [""] or not found:
        return ""
    if len(found) == 1:
        return f" ({next(iter(found))})"
    parts = (f"{' and '.join(keys)} {place}" for place, keys in found.items() if place)
    return f" ({', '.join(parts)})"


def _has(layer: object, key: str) -> bool:
    """Whether a layer has a value for a dotted key, or the key as it is."""
    if isinstance(layer, dict) and key in layer:
        return True
    for name in key.split("."):
        if not isinstance(layer, dict) or name not in layer:
            return False
        layer = layer[name]
    return True


def nearest_key(key: str, keys: list[str], mark: str = "") -> str:
    """The key with the closest name, of the same section if it can be; failing that, its keys."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    everywhere = {k.rpartition(".")[2]: k for k in keys}
    for names in (siblings, everywhere):
        meant = [k for n, k in names.items() if "".join(w[:1] for w in n.split("_")) == name]
        if len(meant) == 1:
            return f"; did you mean {mark + meant[0]!r}?"
        if close := difflib.get_close_matches(name, names, n=1):
            return f"; did you mean {mark + names[close[0]]!r}?"
    if mark and not section:
        return ": --help lists them"
    return f": {section or 'an experiment'} has {', '.join(siblings)}"


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every dotted key of a dataclass with its annotation, depth first."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = dataclass_in(hint)
        # An optional section is a leaf of its own too: `--model.rope_scaling=null`.
        if inner is None or is_union(hint):
            yield prefix + name, hint
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")


def dataclass_in(annotation) -> type | None:
    """The dataclass that an annotation such as `RopeScaling | None` holds."""
    options = typing.get_args(annotation) if is_union(annotation) else (annotation,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)


def is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
