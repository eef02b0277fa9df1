"""How transformers records rotary positions, in the forms of its versions 4 and 5."""

from typing import Any

from jaxlm.errors import UserError
from jaxlm.export.rows import Setting
from jaxlm.model_config import RopeScaling

SETTINGS = (
    Setting("rope_theta", "rope_theta", 10_000.0),
    Setting("rope_scaling", "rope_scaling", None),
)
# Kinds of rotary scaling: our field of RopeScaling, their key.
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
}


def read_rope(settings: dict[str, Any], fraction: float | None = None) -> dict[str, Any]:
    """Settings with `rope_theta` and `rope_scaling` (a RopeScaling or None) at the top.

    transformers 5 keeps both in `rope_parameters`, transformers 4 beside the rest. A family that
    turns a part of each head gives the `fraction` it turns by default, and gets
    `partial_rotary_factor` too. Raises UserError for what the decoder does not offer.
    """
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    rope = settings | rope | {"original_max_position_embeddings": _trained_length(settings, rope)}
    part = rope.get("partial_rotary_factor")
    if fraction is None and part not in (None, 1.0):
        raise UserError(
            f"config.json has partial_rotary_factor={part}, but a model of type "
            f"{settings.get('model_type')} turns whole heads"
        )
    return settings | {
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "rope_scaling": _scaling(rope),
        "partial_rotary_factor": fraction if part is None else part,
    }


def write_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_rope`, in the form of transformers 5 and in that of transformers 4."""
    rope = _written(settings["rope_scaling"])
    parameters = {"rope_theta": settings["rope_theta"]} | (rope or {"rope_type": "default"})
    if "partial_rotary_factor" in settings:
        parameters["partial_rotary_factor"] = settings["partial_rotary_factor"]
    return settings | {"rope_scaling": rope, "rope_parameters": parameters}


def read_two_ropes(settings: dict[str, Any]) -> dict[str, Any]:
    """`read_rope` for global layers, and `rope_local_base_freq` of local ones (Gemma 3)."""
    both = settings.get("rope_parameters") or {}
    theirs = both.get("full_attention", {})
    theta = theirs.get("rope_theta", settings.get("rope_theta", 1_000_000.0))
    rope = (settings.get("rope_scaling") or {}) | theirs | {"rope_theta": theta}
    local = both.get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        raise UserError(
            f"config.json scales the rotary positions of local layers by {local['rope_type']!r}, "
            "but jaxlm scales those of global ones only"
        )
    theta = local.get("rope_theta", settings.get("rope_local_base_freq", 10_000.0))
    one = {k: v for k, v in settings.items() if k != "rope_scaling"} | {"rope_parameters": rope}
    return read_rope(one) | {"rope_local_base_freq": theta}


def write_two_ropes(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_two_ropes`."""
    settings = write_rope(settings)
    local = {"rope_type": "default", "rope_theta": settings["rope_local_base_freq"]}
    both = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    return settings | {"rope_parameters": both}


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys = SCALINGS[scaling.kind].items()
    return {"rope_type": scaling.kind} | {key: getattr(scaling, ours) for ours, key in keys}


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    keys = SCALINGS.get(kind)
    if keys is None:
        raise UserError(
            f"config.json scales rotary positions by {kind!r}, but jaxlm offers "
            f"{' and '.join(SCALINGS)}"
        )
    missing = [key for key in keys.values() if key not in rope]
    if missing:
        raise UserError(f"config.json scales rotary positions by {kind!r} without {missing[0]!r}")
    return RopeScaling(kind=kind, **{ours: rope[key] for ours, key in keys.items()})


def _trained_length(settings: dict[str, Any], rope: dict[str, Any]) -> int:
    """The context length before scaling; left out, it is the length after it."""
    length = settings.get("max_position_embeddings", 2048)
    return rope.get("original_max_position_embeddings", length)
