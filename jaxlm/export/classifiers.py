"""Classifiers of texts, as transformers stores them: labels, and heads on its decoders."""

import dataclasses
from typing import Any

from jaxlm.errors import UserError
from jaxlm.export.rows import Setting, Tensor
from jaxlm.export.table import Family

SUFFIX = "ForSequenceClassification"
LABELS = Setting("labels", "labels")
PROBLEM = "single_label_classification"


def is_classifier(settings: dict[str, Any]) -> bool:
    """Whether a config.json is of a classifier of texts."""
    return any(str(name).endswith(SUFFIX) for name in settings.get("architectures") or ())


def read_labels(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with `labels`, in their order."""
    if settings.get("problem_type") not in (None, PROBLEM):
        raise UserError(
            f"config.json has problem_type={settings['problem_type']!r}, but jaxlm's classifiers "
            "give a text one label of several"
        )
    names = settings.get("id2label")
    if names is None:  # which transformers leaves out where they have no names
        count = settings.get("num_labels", 2)
        names = {i: f"LABEL_{i}" for i in range(count)}
    by_number = {int(number): name for number, name in names.items()}
    return settings | {"labels": [by_number[i] for i in range(len(by_number))]}


def write_labels(settings: dict[str, Any]) -> dict[str, Any]:
    """Undo `read_labels`."""
    labels = settings["labels"]
    rest = {key: value for key, value in settings.items() if key != "labels"}
    return rest | {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": PROBLEM,
    }


def decoder_classifier(family: Family) -> Family:
    """The family with a head of labels, which reads a text's last token, as its score."""

    def read(settings: dict[str, Any]) -> dict[str, Any]:
        return read_labels(family.read(settings))

    def write(settings: dict[str, Any]) -> dict[str, Any]:
        return write_labels(family.write(settings))

    body = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if family.model_type == "gemma3_text":
        body = "Gemma3Text"  # the other name is that of a model which also sees
    return dataclasses.replace(
        family,
        architecture=body + SUFFIX,
        tensors=(*family.tensors, Tensor("score.weight", "classifier/out/kernel", "de->ed")),
        settings=(*family.settings, LABELS),
        read=read,
        write=write,
    )
