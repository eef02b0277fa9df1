"""Presets against the published models: the number of parameters and the fields' effect."""

import math

import jax
import pytest
from tiny import task_of

from jaxlm.cli import build_config
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
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
    "t5-small": (32128, 60_506_624),
    # Less two tables of sinusoids [512, 512], which are stored there and computed here, and with
    # the bias of the logits, which is no parameter there.
    "marian-base": (58101, 74_410_496 - 2 * 512 * 512 + 58101),
    "bert-tiny": (30522, 4_385_920),
    "bert-base": (30522, 109_482_240),
    "roberta-base": (50265, 124_645_632),
    # Less its pooler, which it does not use.
    "minilm-l6": (30522, 22_713_216 - 384 * 385),
    "lstm-medium": (10000, 19_780_400),
}


def config_of(preset: str, **fields):
    return build_config({"task": task_of(preset), "model": {"preset": preset} | fields})


@pytest.mark.parametrize("preset", PUBLISHED)
def test_number_of_parameters_is_the_published_one(preset):
    vocab_size, published = PUBLISHED[preset]
    config = config_of(preset, vocab_size=vocab_size)
    shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published


def test_every_preset_is_compared_or_tiny():
    tiny = {"llama-tiny", "gpt2-tiny", "transformer-tiny", "lstm-tiny", "lstm-seq2seq-tiny"}
    assert PRESETS.keys() - PUBLISHED.keys() == tiny | {"transformer-base"}


def test_the_transformer_is_that_of_the_paper():
    config = config_of("transformer-base", vocab_size=37_000)
    shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(65e6, rel=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_and_arrives_in_the_config(preset):
    model = config_of(preset).model
    assert model.preset == preset
    for field, value in PRESETS[preset].items():
        if isinstance(value, dict):
            assert {key: getattr(getattr(model, field), key) for key in value} == value
        else:
            assert getattr(model, field) == (tuple(value) if isinstance(value, list) else value)


def test_the_default_preset_is_the_defaults():
    assert PRESETS[ModelConfig().preset] == {}
