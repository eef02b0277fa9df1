"""How transformers records which layers attend to a window: a list of types, or older numbers."""

from collections.abc import Callable
from typing import Any

from jaxlm.errors import UserError
from jaxlm.export.rows import Setting

SETTINGS = (
    Setting("layer_pattern", "layer_pattern"),
    Setting("sliding_window", "sliding_window", None),
)
TYPES = {"full_attention": "global", "sliding_attention": "local"}


def read_layers(
    settings: dict[str, Any], is_local: Callable[[dict[str, Any], int], bool]
) -> dict[str, Any]:
    """Settings with `layer_pattern`, and `sliding_window` None where no layer has a window.

    `is_local(settings, i)` tells what layer i is where there is no `layer_types`.
    """
    count = settings.get("num_hidden_layers", 0)
    types = settings.get("layer_types")
    if types is None:
        kinds = ["local" if is_local(settings, i) else "global" for i in range(count)]
    else:
        unknown = sorted(set(types) - TYPES.keys())
        if unknown:
            raise UserError(
                f"config.json has layer_types {unknown}, but jaxlm computes {', '.join(TYPES)}"
            )
        kinds = [TYPES[name] for name in types]
    window = settings.get("sliding_window") if "local" in kinds else None
    if window is None:
        kinds = ["global"] * len(kinds)
    return settings | {"layer_pattern": _period(kinds), "sliding_window": window}


def write_layers(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_layers`; also notes how many layers come before those with a window."""
    names = {ours: theirs for theirs, ours in TYPES.items()}
    pattern, count = settings["layer_pattern"], settings["num_hidden_layers"]
    types = [names[pattern[i % len(pattern)]] for i in range(count)]
    is_local = [name == names["local"] for name in types]
    rest = {key: value for key, value in settings.items() if key != "layer_pattern"}
    return rest | {
        "layer_types": types,
        "use_sliding_window": any(is_local),
        "max_window_layers": is_local.index(True) if any(is_local) else count,
    }


def read_all_alike(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of families whose layers all have the window, if there is one (Mistral, Phi-3)."""
    settings = settings | {"layer_types": None}
    return read_layers(settings, lambda settings, i: settings.get("sliding_window") is not None)


def write_all_alike(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_all_alike`. Raises UserError where layers differ."""
    pattern = settings["layer_pattern"]
    if len(set(pattern)) > 1:
        raise UserError(
            f"model.layer_pattern={list(pattern)} cannot be written as {settings['model_type']}, "
            "whose layers are all alike"
        )
    return {key: value for key, value in settings.items() if key != "layer_pattern"}


def _period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that repeats into `kinds`."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return tuple(kinds) or ("global",)
