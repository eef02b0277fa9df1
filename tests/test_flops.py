"""The arithmetic of a step."""

import jax
import pytest

from jaxlm.flops import peak_flops, training_flops_per_token
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
from jaxlm.sharding import split_boxes

# Models, and how many times each attends.
MODELS = [
    ({"mlp": "gelu", "tie_embeddings": False}, 4),
    ({"mlp": "swiglu", "tie_embeddings": False}, 4),
    ({"kind": "encoder_decoder", "encoder_layers": 3, "tie_embeddings": False}, 3 + 2 * 4),
    ({"kind": "encoder", "pooler": True, "labels": ("a", "b", "c")}, 4),
    ({"labels": ("a", "b", "c")}, 4),
    ({"kind": "gru", "tie_embeddings": False}, 0),
    ({"kind": "lstm", "encoder_layers": 4, "source_attention": True, "tie_embeddings": False}, 1),
]


@pytest.mark.parametrize(("fields", "attentions"), MODELS, ids=str)
def test_six_for_every_weight_of_a_matrix_product_and_attention_in_full(fields, attentions):
    config = ModelConfig(vocab_size=101, **fields)
    params, _ = split_boxes(jax.eval_shape(make_model(config).init, jax.random.key(0)))
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    attention = 12 * attentions * config.num_heads * config.head_size * 64
    assert training_flops_per_token(config, 64) == 6 * sum(kernels) + attention
    if fields.get("kind") != "lstm":
        causally = training_flops_per_token(config, 64, causal=True)
        assert causally == 6 * sum(kernels) + attention / 2


def test_an_unknown_device_or_type_has_no_peak():
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
