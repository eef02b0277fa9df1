"""Presets against the published models: the number of parameters and the fields' effect."""

import math

import jax
import pytest

from jaxlm.cli import build_config
from jaxlm.model_config import ModelConfig
from jaxlm.models.decoder import Decoder
from jaxlm.presets import PRESETS

# Published vocabulary and number of parameters.
PUBLISHED = {
    "gpt2-124m": (50257, 124_439_808),
    "gpt2-355m": (50257, 354_823_168),
    "gpt2-774m": (50257, 774_030_080),
    "gpt2-1.5b": (50257, 1_557_611_200),
    "llama2-7b": (32000, 6_738_415_616),
    "llama3-1b": (128256, 1_235_814_400),
    "llama3-3b": (128256, 3_212_749_824),
    "llama3-8b": (128256, 8_030_261_248),
    "llama3-70b": (128256, 70_553_706_496),
    "mistral-7b": (32000, 7_241_732_096),
    "qwen2-0.5b": (151936, 494_032_768),
    "qwen2-7b": (152064, 7_615_616_512),
    "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-1.7b": (151936, 1_720_574_976),
    "qwen3-8b": (151936, 8_190_735_360),
    "mixtral-8x7b": (32000, 46_702_792_704),
    "qwen3-30b-a3b": (151936, 30_532_122_624),
    "gemma-2b": (256000, 2_506_172_416),
    "gemma2-2b": (256000, 2_614_341_888),
    "gemma3-1b": (262144, 999_885_952),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_number_of_parameters_is_the_published_one(preset):
    vocab_size, published = PUBLISHED[preset]
    config = build_config({"model": {"preset": preset, "vocab_size": vocab_size}})
    shapes = jax.eval_shape(Decoder(config.model).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published


def test_every_preset_is_compared_or_tiny():
    assert PRESETS.keys() - PUBLISHED.keys() == {"llama-tiny", "gpt2-tiny"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_and_arrives_in_the_config(preset):
    model = build_config({"model": {"preset": preset}}).model
    assert model.preset == preset
    for field, value in PRESETS[preset].items():
        if isinstance(value, dict):
            assert {key: getattr(getattr(model, field), key) for key in value} == value
        else:
            assert getattr(model, field) == (tuple(value) if isinstance(value, list) else value)


def test_the_default_preset_is_the_defaults():
    assert PRESETS[ModelConfig().preset] == {}
