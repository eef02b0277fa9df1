"""Which model a configuration is of."""

import functools

import jax

from jaxlm.errors import UserError
from jaxlm.model_config import RECURRENT, ModelConfig
from jaxlm.models.decoder import Decoder
from jaxlm.models.encoder import Encoder
from jaxlm.models.encoder_decoder import EncoderDecoder
from jaxlm.models.recurrent import RecurrentModel
from jaxlm.parallel.pipeline import Schedule


def make_model(config: ModelConfig, schedule: Schedule = Schedule()):  # noqa: B008
    """The model of a configuration; `schedule` is that of its pipeline.

    Every kind offers `init`, `hidden`, `logits`, `init_cache` and `stacks`, as `Decoder` does.
    """
    if config.kind == "ngram":
        raise UserError(
            "model.kind=ngram is counts, without parameters: it can be evaluated, sampled from and "
            "scored with, nothing else"
        )
    kinds = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}
    kinds |= dict.fromkeys(RECURRENT, RecurrentModel)
    return kinds[config.kind](config, schedule)


@functools.lru_cache(maxsize=64)
def param_shapes(config: ModelConfig) -> dict:
    """What `init` of a model gives, as shapes, boxed with their logical axes; traced once."""
    return jax.eval_shape(make_model(config).init, jax.random.key(0))
