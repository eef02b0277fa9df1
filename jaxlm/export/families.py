"""The families that have a table, and which of them a configuration belongs to."""

from collections.abc import Mapping
from typing import Any

from jaxlm.errors import UserError, nearest
from jaxlm.export.classifiers import decoder_classifier, is_classifier
from jaxlm.export.encoder_decoders import MARIAN, T5
from jaxlm.export.encoders import BERT, BERT_CLASSIFIER, ROBERTA, ROBERTA_CLASSIFIER
from jaxlm.export.gemma import GEMMA, GEMMA2, GEMMA3
from jaxlm.export.gpt import GPT2, GPT_NEOX
from jaxlm.export.llama import DESCENDANTS
from jaxlm.export.mixtures import MIXTRAL, QWEN3_MOE
from jaxlm.export.table import Family
from jaxlm.model_config import ModelConfig

_DECODERS = (*DESCENDANTS, GPT2, GPT_NEOX, GEMMA, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE)
FAMILIES: dict[str, Family] = {f.model_type: f for f in (*_DECODERS, BERT, ROBERTA, T5, MARIAN)}
CLASSIFIERS: dict[str, Family] = {
    family.model_type: family
    for family in (*map(decoder_classifier, _DECODERS), BERT_CLASSIFIER, ROBERTA_CLASSIFIER)
}


def family_of(settings: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises UserError for one without a table."""
    model_type = settings.get("model_type")
    families = CLASSIFIERS if is_classifier(settings) else FAMILIES
    if not isinstance(model_type, str) or model_type not in families:
        what = " of classifiers" if families is CLASSIFIERS else ""
        raise UserError(
            f"config.json has model_type={model_type!r}, for which jaxlm has no table{what}"
            f"{nearest(str(model_type), families)} (it has {', '.join(families)})"
        )
    return families[model_type]


def family_for(config: ModelConfig, name: str | None = None) -> Family:
    """The first family that can express a model, or the one called `name`.

    Raises UserError with what keeps the model out of that family, or out of the closest one.
    """
    families = FAMILIES if config.labels is None else CLASSIFIERS
    if name is not None:
        if name not in families:
            raise UserError(
                f"family {name!r} has no table{nearest(name, families)} (jaxlm has "
                f"{', '.join(families)})"
            )
        families[name].config_to_theirs(config)
        return families[name]
    refusals = []
    alike = [f for f in families.values() if f.fixed.get("kind", "decoder") == config.kind]
    for family in alike:
        try:
            family.config_to_theirs(config)
            return family
        except UserError as error:
            refusals.append((max(1, len(family.misfits(config))), str(error)))
    _, closest = min(refusals, key=lambda refusal: refusal[0])
    raise UserError(
        f"no family of transformers can express this model (the closest: {closest}): use the run "
        "itself by jaxlm.load, or train a model that a family can express"
    )
