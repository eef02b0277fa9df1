"""The arithmetic of a step."""

import jax
import pytest

from jaxlm.flops import peak_flops, training_flops_per_token
from jaxlm.model_config import ModelConfig
from jaxlm.models.decoder import Decoder
from jaxlm.sharding import split_boxes


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_six_for_every_weight_of_a_matrix_product_and_attention_in_full(mlp):
    config = ModelConfig(vocab_size=101, tie_embeddings=False, mlp=mlp)
    params, _ = split_boxes(jax.eval_shape(Decoder(config).init, jax.random.key(0)))
    matrices = params["layers"], params["head"]
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(matrices)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    attention = 12 * config.num_layers * config.num_heads * config.head_size * 64
    assert training_flops_per_token(config, 64) == 6 * sum(kernels) + attention


def test_an_unknown_device_or_type_has_no_peak():
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
