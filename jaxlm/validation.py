"""What a run says of itself now and then: loss on held-out text, a sample, a yardstick."""

import math
from collections.abc import Callable

import jax
import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Prepared
from jaxlm.decode import Sampling, build_decode_program
from jaxlm.errors import UserError
from jaxlm.inputs import Inputs
from jaxlm.processes import Group
from jaxlm.step import Program, build_model
from jaxlm.tasks.language_modelling import compressed_bits, loss_metrics


class Validation:
    """Validation of one run. Every process calls the same methods with the same parameters."""

    def __init__(
        self, config: Config, program: Program, prepared: Prepared, inputs: Inputs, group: Group
    ):
        """Raises UserError for a prompt of the sample that is too long."""
        self._config = config
        self._program = program
        self._tokenizer = prepared.tokenizer
        self._inputs = inputs
        self._group = group
        self._decoder = build_decode_program(build_model(config, program.mesh), program.mesh)
        self._prompt = self._sample_prompt()
        self._bits_per_byte = math.nan

    def loss(self, params, moved: Callable[[], None]) -> dict[str, float]:
        """Metrics of the validation text; `moved` is called after each batch."""
        sums, num_bytes = [], 0
        lengths = self._tokenizer.byte_lengths
        for batch in self._inputs.validation():
            sums.append(self._program.eval_step(params, self._inputs.put(batch)))
            # Rows that several processes hold count once.
            mine = self._inputs.owned
            num_bytes += int(lengths[batch.targets[mine][batch.weights[mine] > 0]].sum())
            moved()
        num_bytes = sum(self._group.gather(num_bytes))
        sums = jax.tree.map(
            lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(sums)
        )
        metrics = loss_metrics(float(sums.nats), float(sums.weight), num_bytes)
        self._bits_per_byte = metrics["valid_bits_per_byte"]
        return metrics

    def sample(self, params) -> str | None:
        """A continuation of the config's prompt, if there is one."""
        if self._prompt is None:
            return None
        room = self._config.model.max_seq_len - len(self._prompt)
        (texts,) = self._decoder.generate(
            self._decoder.prepare(params),
            [self._prompt],
            max_new_tokens=min(self._config.train.sample_tokens, room),
            sampling=Sampling(temperature=0.8),
            eos_id=self._tokenizer.eos_id,
            seed=self._config.seed,
        )
        return self._tokenizer.decode([*self._prompt, *texts[0]])

    def yardstick(self) -> str:
        """What general compressors make of the same validation text."""
        text = b"".join(
            self._tokenizer.decode_bytes(batch.targets[batch.weights > 0].tolist())
            for batch in self._inputs.validation(whole=True)
        )
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in compressed_bits(text).items())
        return (
            f"bits/byte on {len(text):,} bytes of validation text: model "
            f"{self._bits_per_byte:.3f}, {others}"
        )

    def _sample_prompt(self) -> list[int] | None:
        text = self._config.train.sample_prompt
        if not text:
            return None
        tokens = [self._tokenizer.bos_id, *self._tokenizer.encode(text)]
        if len(tokens) >= self._config.model.max_seq_len:
            raise UserError(
                f"train.sample_prompt has {len(tokens)} tokens, which leaves no room in "
                f"model.max_seq_len={self._config.model.max_seq_len}: shorten it"
            )
        return tokens
