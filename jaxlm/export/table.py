"""How a family's table is written down, and how it is read in both directions.

A family is data: rows of tensors, rows of settings, and what it takes for granted. A row whose
parameter the model at hand lacks (a bias, a separate head) is passed over, so that one table
serves every variant of a family.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from jaxlm.errors import UserError
from jaxlm.export.rows import REQUIRED, Part, Setting, Tensor
from jaxlm.model_config import ExpertsConfig, ModelConfig
from jaxlm.models.build import param_shapes
from jaxlm.sharding import by_path, split_boxes

# What a checkpoint does not record: how to train and run, not what is computed.
UNRECORDED = frozenset(
    {
        *("preset", "dtype", "attention", "stack", "remat", "dropout", "attention_dropout"),
        *("init_mean", "init_std", "scale_residual_init"),
        *("experts.balance_loss", "experts.router_z_loss", "experts.capacity"),
    }
)
EXPERTS = "experts."


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: its tensors and its configuration, both ways.

    Every field of ModelConfig that has no row in `settings` and is not in `fixed` must stand at
    its default, so a model that the family cannot express is refused.
    """

    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    settings: tuple[Setting, ...]
    fixed: Mapping[str, Any]
    """Our fields that the family implies."""
    expected: Mapping[str, Any]
    """Their settings that must have this value where they are given; written as such."""
    prefix: str = ""
    """Begins the names of the body's tensors; a checkpoint of the body alone leaves it out."""
    whole: str = ""
    """Of a family that is a body alone: begins its tensors' names where a checkpoint has more."""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors that may be stored a second time, under these names, where they are tied."""
    spare: str = r"(?!)"
    """A pattern of names that checkpoints carry and the model, unless it has a row, does not use:
    buffers in which nothing was learned, heads of other tasks."""
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors (endings of their names) whose presence decides a setting, as no config.json does."""
    read: Callable[[dict], dict] = dict
    """Brings their settings into the form `settings` names."""
    write: Callable[[dict], dict] = dict
    """Undoes `read`."""

    def to_theirs(self, params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters under their names and in their layout, one tensor at a time.

        Types are kept. Raises UserError for a parameter that the family has no place for.
        """
        ours = by_path(params)
        for row in self.rows(shapes_of(config)):
            parts = [ours[path] for path in row.parts]
            for index in _counted(row, parts[0].shape):
                # One layer of a stack, which is fetched from the devices here.
                yield (
                    row.theirs.format(*index),
                    row.to_theirs([np.asarray(p[index]) for p in parts]),
                )

    def to_ours(self, tensors: Mapping[str, Any], config: ModelConfig) -> Iterator["Part"]:
        """Their tensors as parts of our parameters, in the order of the rows.

        `tensors` are by name, and looked at one after the other. Raises UserError, before the
        first part, for a tensor that is missing, not known, or of another shape.
        """
        shapes = shapes_of(config)
        tensors = self.canonical(tensors, config)
        self._check(tensors, config)
        for row in self.rows(shapes):
            for index in _counted(row, shapes[row.parts[0]]):
                ours = [shapes[path][len(index) :] for path in row.parts]
                views = row.split(np.asarray(tensors[row.theirs.format(*index)]), ours)
                for path, view in zip(row.parts, views, strict=True):
                    yield Part(path, index, view, row.order)

    def config_to_ours(self, settings: Mapping[str, Any]) -> ModelConfig:
        """Their config.json as a ModelConfig.

        Raises UserError for a setting that is missing or that changes what is computed in a way
        jaxlm does not offer.
        """
        try:
            settings = self.read(dict(settings))
            for key, value in self.expected.items():
                if settings.get(key, value) != value:
                    raise UserError(
                        f"config.json of a {self.model_type} model has {key}={settings[key]!r}, "
                        f"but jaxlm computes {key}={value!r} only"
                    )
            fields = dict(self.fixed)
            for row in self.settings:
                fields[row.ours] = settings.get(row.theirs, row.default)
                if fields[row.ours] is REQUIRED:
                    raise UserError(
                        f"config.json of a {self.model_type} model has no {row.theirs!r}"
                    )
            return ModelConfig(**_nested(fields))
        except UserError:
            raise
        except ValidationError as error:
            raise UserError(
                f"config.json of a {self.model_type} model: {_sentence(error)}"
            ) from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"config.json of a {self.model_type} model has a setting of another kind than "
                f"transformers writes ({error})"
            ) from None

    def config_to_theirs(self, config: ModelConfig) -> dict[str, Any]:
        """A ModelConfig as their config.json. Raises UserError for what they cannot express."""
        for misfit in self.misfits(config):
            raise UserError(misfit)
        ours = _resolved(config)
        settings = {"model_type": self.model_type, "architectures": [self.architecture]}
        settings |= self.expected
        written = {}
        for row in self.settings:
            if ours[row.ours] is None and row.default is REQUIRED:
                raise UserError(f"model.{row.ours} is not set, but {self.model_type} records it")
            if settings.get(row.theirs, ours[row.ours]) != ours[row.ours]:
                raise UserError(
                    f"model.{row.ours}={ours[row.ours]} does not fit model.{written[row.theirs]}="
                    f"{settings[row.theirs]}: {self.model_type} has one {row.theirs!r} for both"
                )
            settings[row.theirs] = ours[row.ours]
            written[row.theirs] = row.ours
        return self.write(settings)

    def rows(self, shapes: Mapping[str, tuple]) -> list[Tensor]:
        """The rows that this model has parameters for, which must be all of its parameters."""
        rows = [row for row in self.tensors if row.counts(shapes)]
        homeless = shapes.keys() - {path for row in rows for path in row.parts}
        if homeless:
            raise UserError(
                f"{self.model_type} checkpoints have no place for {_listed(homeless)}: "
                "export the model as another family"
            )
        return rows

    def canonical(self, tensors: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """The tensors by their names here, without spare ones and second copies."""
        if self.prefix and not any(name.startswith(self.prefix) for name in tensors):
            tensors = {self.prefix + name: tensor for name, tensor in tensors.items()}
        wanted = self.shapes(config)
        tensors = {name.removeprefix(self.whole): tensor for name, tensor in tensors.items()}
        tensors = {n: t for n, t in tensors.items() if n in wanted or not re.search(self.spare, n)}
        for copy, original in self.copies.items():
            if copy in wanted or not {copy, original} <= tensors.keys():
                continue
            if not np.array_equal(tensors.pop(copy), tensors[original]):
                raise UserError(
                    f"{copy} differs from {original}, but the checkpoint says they are tied: "
                    "set tie_word_embeddings to false in its config.json"
                )
        return tensors

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each of their tensors, by name, in the order of `to_theirs`."""
        ours, wanted = shapes_of(config), {}
        for row in self.rows(ours):
            for index in _counted(row, ours[row.parts[0]]):
                one = [ours[path][len(index) :] for path in row.parts]
                wanted[row.theirs.format(*index)] = row.shape(one)
        return wanted

    def _check(self, tensors: Mapping[str, Any], config: ModelConfig):
        """Raise UserError unless the tensors are exactly those of the rows."""
        wanted = self.shapes(config)
        missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
        if missing or extra:
            sentences = [
                f"{fault} {_listed(names)}"
                for fault, names in (("lacks", missing), ("has unknown", extra))
                if names
            ]
            raise UserError(f"the {self.model_type} checkpoint {' and '.join(sentences)}")
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise UserError(
                    f"tensor {name} of the {self.model_type} checkpoint has shape "
                    f"{tuple(tensors[name].shape)}, but its configuration asks for {shape}"
                )

    def misfits(self, config: ModelConfig) -> list[str]:
        """What of a model the family cannot express, a sentence each."""
        has_experts = any(row.ours.startswith(EXPERTS) for row in self.settings)
        if has_experts != (config.experts is not None):
            there = "has none" if has_experts else f"has {config.experts.num_experts}"
            needed = "records a mixture of experts" if has_experts else "has dense layers"
            return [f"{self.model_type} {needed}, but the model {there} (model.experts)"]
        free = UNRECORDED | {row.ours for row in self.settings}
        defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
        if has_experts:
            experts = dataclasses.fields(ExpertsConfig)
            defaults |= {EXPERTS + f.name: f.default for f in experts}
            free |= {"experts"}
        implied = {k: v for k, v in (defaults | dict(self.fixed)).items() if k not in free}
        ours, theirs = _resolved(config), _resolved(config, **implied)
        return [
            f"model.{name}={ours[name]!r} cannot be written as {self.model_type}, which implies "
            f"{name}={theirs[name]!r}"
            for name in implied
            if ours[name] != theirs[name]
        ]


def _counted(row: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The indices that fill the `{}` of a row's name: one empty index where there is none."""
    return np.ndindex(shape[: row.theirs.count("{}")])


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path."""
    params, _ = split_boxes(param_shapes(config))
    return {path: leaf.shape for path, leaf in by_path(params).items()}


def _resolved(config: ModelConfig, **changes) -> dict[str, Any]:
    """The fields of a configuration, changed, with what is null as it comes out.

    Those of a mixture of experts are beside the others, as "experts.top_k".
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.experts is not None:
        experts = dataclasses.fields(config.experts)
        fields |= {EXPERTS + f.name: getattr(config.experts, f.name) for f in experts}
    fields |= changes
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["d_model"] // fields["num_heads"]
    fields["attention_scale"] = fields["attention_scale"] or fields["head_dim"] ** -0.5
    fields["pooling"] = fields["pooling"] or config.pools
    if fields["kind"] == "encoder_decoder":
        fields["encoder_layers"] = fields["encoder_layers"] or fields["num_layers"]
    if config.experts is not None:
        fields["experts.d_ff"] = fields["experts.d_ff"] or fields["d_ff"]
    return fields


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `_resolved`'s flattening."""
    experts = {k.removeprefix(EXPERTS): v for k, v in fields.items() if k.startswith(EXPERTS)}
    rest = {k: v for k, v in fields.items() if not k.startswith(EXPERTS)}
    return rest | ({"experts": ExpertsConfig(**experts)} if experts else {})


def check_whole_heads(settings: Mapping[str, Any]) -> None:
    """Raise UserError where transformers would not build a model of these settings."""
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"model.d_model={width} is not a multiple of model.num_heads={heads}, which "
            f"transformers asks of a {settings['model_type']} model whatever its head_dim"
        )


def _sentence(error: ValidationError) -> str:
    """What is wrong with a configuration: ours to say, or else the first of pydantic's errors."""
    first = error.errors()[0]
    where = "".join(f"{part}={first['input']!r}: " for part in first["loc"])
    return str(first.get("ctx", {}).get("error", where + first["msg"]))


def _listed(names: Iterable[str], most: int = 4) -> str:
    """The first few of a set of names, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
