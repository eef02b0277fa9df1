"""BERT and RoBERTa, as transformers stores them: encoders alone, and with a classifier's head."""

import dataclasses
from typing import Any

from jaxlm.errors import UserError, nearest
from jaxlm.export.classifiers import LABELS, read_labels, write_labels
from jaxlm.export.rows import Setting, Tensor
from jaxlm.export.table import Family

ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "relu": "relu",
    "silu": "silu",
    # Other names of the same, which are not written.
    "gelu_pytorch_tanh": "gelu",
    "swish": "silu",
}
# Architectures in whose checkpoints an encoder usually has its pooler.
POOLING = ("Model", "ForPreTraining", "ForNextSentencePrediction")


def dense(theirs: str, ours: str, layout: str) -> tuple[Tensor, Tensor]:
    """The rows of a projection: its kernel, laid out so, and its bias."""
    outputs = layout.partition("->")[2]
    bias = outputs[: outputs.rindex(")") + 1] if outputs.startswith("(") else outputs[0]
    return (
        Tensor(f"{theirs}.weight", f"{ours}/kernel", layout),
        Tensor(f"{theirs}.bias", f"{ours}/bias", f"{bias.strip('()')}->{bias}"),
    )


def norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
    """The rows of a LayerNorm."""
    return (
        Tensor(f"{theirs}.weight", f"{ours}/scale", "d"),
        Tensor(f"{theirs}.bias", f"{ours}/bias", "d"),
    )


def activation(settings: dict[str, Any], key: str) -> str:
    """Our name of the activation that a setting names. Raises UserError for one we lack."""
    name = settings.get(key, "gelu")
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json has {key}={name!r}, but jaxlm computes {', '.join(ACTIVATIONS)}"
            f"{nearest(str(name), ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def activation_name(mlp: str, model_type: str) -> str:
    """Undo `activation`."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == mlp:
            return theirs
    raise UserError(
        f"model.mlp={mlp} cannot be written as {model_type}, whose feed-forward layers have no gate"
    )


def _rows(prefix: str) -> tuple[Tensor, ...]:
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{}}."
    attention, out = f"{layer}attention.self.", f"{layer}attention.output."
    return (
        Tensor(f"{embeddings}word_embeddings.weight", "embed/embedding", "vd"),
        Tensor(f"{embeddings}position_embeddings.weight", "positions/embedding", "td"),
        Tensor(f"{embeddings}token_type_embeddings.weight", "token_types/embedding", "td"),
        *norm(f"{embeddings}LayerNorm", "embedding_norm"),
        *dense(f"{attention}query", "layers/attention/q", "dnh->(nh)d"),
        *dense(f"{attention}key", "layers/attention/k", "dnh->(nh)d"),
        *dense(f"{attention}value", "layers/attention/v", "dnh->(nh)d"),
        *dense(f"{out}dense", "layers/attention/out", "nhd->d(nh)"),
        *norm(f"{out}LayerNorm", "layers/attention_post_norm"),
        *dense(f"{layer}intermediate.dense", "layers/mlp/up", "df->fd"),
        *dense(f"{layer}output.dense", "layers/mlp/down", "fd->df"),
        *norm(f"{layer}output.LayerNorm", "layers/mlp_post_norm"),
    )


def _read_bert(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with our name of the activation, and whether there is a pooler."""
    first, *_ = settings.get("architectures") or ["BertModel"]
    pooler = settings.get("pooler", first.endswith(POOLING))
    return settings | {"pooler": pooler, "hidden_act": activation(settings, "hidden_act")}


def _write_bert(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in settings.items() if key != "pooler"}
    name = activation_name(settings["hidden_act"], settings["model_type"])
    return settings | {"hidden_act": name}


def _read_roberta(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of which the positions are those that texts have.

    Their positions start behind that which has the padding token's number.
    """
    settings = _read_bert({"pad_token_id": 1} | settings)
    offset = settings["pad_token_id"] + 1
    rows = settings.get("max_position_embeddings", 512)
    return settings | {"max_position_embeddings": rows - offset, "position_offset": offset}


def _write_roberta(settings: dict[str, Any]) -> dict[str, Any]:
    settings = _write_bert(settings)
    offset = settings.pop("position_offset")
    if not offset:
        raise UserError(
            "model.position_offset=0 cannot be written as roberta, whose positions start behind "
            "that of a padding token"
        )
    rows = settings["max_position_embeddings"] + offset
    return settings | {"max_position_embeddings": rows, "pad_token_id": offset - 1}


def _classifier(family: Family, architecture: str, prefix: str, *head: Tensor) -> Family:
    """The family with a classifier's head, whose rows these are, in place of its pooler."""

    def read(settings: dict[str, Any]) -> dict[str, Any]:
        return read_labels(family.read(settings))

    def write(settings: dict[str, Any]) -> dict[str, Any]:
        return write_labels(family.write(settings))

    return dataclasses.replace(
        family,
        architecture=architecture,
        tensors=(*_rows(prefix), *head),
        settings=(*(row for row in family.settings if row.ours != "pooler"), LABELS),
        fixed=family.fixed | {"pooler": True},
        prefix=prefix,
        whole="",
        optional={},
        read=read,
        write=write,
    )


_POOLER = dense("pooler.dense", "classifier/dense", "de->ed")
BERT = Family(
    model_type="bert",
    architecture="BertModel",
    tensors=(*_rows(""), *_POOLER),
    settings=(
        Setting("vocab_size", "vocab_size"),
        Setting("max_seq_len", "max_position_embeddings", 512),
        Setting("d_model", "hidden_size"),
        Setting("num_layers", "num_hidden_layers"),
        Setting("num_heads", "num_attention_heads"),
        Setting("d_ff", "intermediate_size"),
        Setting("mlp", "hidden_act"),
        Setting("norm_eps", "layer_norm_eps", 1e-12),
        Setting("token_types", "type_vocab_size", 2),
        Setting("pooler", "pooler"),
        Setting("init_std", "initializer_range", 0.02),
        Setting("dropout", "hidden_dropout_prob", 0.1),
        Setting("attention_dropout", "attention_probs_dropout_prob", 0.1),
    ),
    fixed={
        "kind": "encoder",
        "num_kv_heads": None,
        "norm": "layernorm",
        "norm_bias": True,
        "norm_placement": "post_sum",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
        "embedding_norm": True,
        "pooling": "first",
    },
    expected={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    whole="bert.",
    optional={"pooler.dense.weight": "pooler"},
    spare=r"position_ids$|^cls\.|^lm_head\.|^(bert\.|roberta\.)?pooler\.",
    read=_read_bert,
    write=_write_bert,
)
ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    architecture="RobertaModel",
    settings=(*BERT.settings, Setting("position_offset", "position_offset")),
    whole="roberta.",
    read=_read_roberta,
    write=_write_roberta,
)
BERT_CLASSIFIER = _classifier(
    BERT,
    "BertForSequenceClassification",
    "bert.",
    *dense("bert.pooler.dense", "classifier/dense", "de->ed"),
    *dense("classifier", "classifier/out", "de->ed"),
)
ROBERTA_CLASSIFIER = _classifier(
    ROBERTA,
    "RobertaForSequenceClassification",
    "roberta.",
    *dense("classifier.dense", "classifier/dense", "de->ed"),
    *dense("classifier.out_proj", "classifier/out", "de->ed"),
)
