"""How the next token is chosen from the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; `temperature` 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    """Nucleus sampling (Holtzman et al., 2020)."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen, multiplies negative ones (Keskar et al., 2019)."""

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What is compiled for: (greedy, filtered, penalised). Numbers are traced."""
        filtered = any(x is not None for x in (self.top_k, self.top_p, self.min_p))
        return np.float32(self.temperature) == 0, filtered, self.repetition_penalty != 1.0

    def numbers(self, vocab_size: int) -> dict[str, np.ndarray]:
        """The settings as arrays, the unset ones at the value that does nothing."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(min(self.top_k or vocab_size, vocab_size)),
            "top_p": np.float32(1.0 if self.top_p is None else self.top_p),
            "min_p": np.float32(self.min_p or 0.0),
            "repetition_penalty": np.float32(self.repetition_penalty),
        }


def row_keys(key, sample_ids, positions):
    """The random keys [B] of rows: functions of the seed's key, the sample and the position."""

    def row_key(sample_id, position):
        return jax.random.fold_in(jax.random.fold_in(key, sample_id), position)

    return jax.vmap(row_key)(sample_ids, positions)


def without(scores_bv, never_id):
    """Logits or log-probabilities in which one token is impossible; -1 is none."""
    return jnp.where(jnp.arange(scores_bv.shape[1])[None, :] == never_id, -jnp.inf, scores_bv)


def choose(logits_bv, keys, kind: tuple[bool, bool, bool], numbers: dict, seen_bv=None):
    """The next token [B] from float32 logits; `keys` [B] are the rows' own random keys."""
    greedy, filtered, penalised = kind
    if penalised:
        penalty = numbers["repetition_penalty"]
        scaled = jnp.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)
        logits_bv = jnp.where(seen_bv, scaled, logits_bv)
    if greedy:
        return jnp.argmax(logits_bv, -1).astype(jnp.int32)
    logits_bv = logits_bv / numbers["temperature"]
    if filtered:
        logits_bv = jnp.where(logits_bv >= _threshold(logits_bv, numbers), logits_bv, -jnp.inf)
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits_bv.shape[1:]))(keys)
    return jnp.argmax(logits_bv + gumbel, -1).astype(jnp.int32)


def _threshold(logits_bv, numbers: dict):
    """The smallest logit [B, 1] that top-k, then top-p, then min-p leave."""
    sorted_bv = -jnp.sort(-logits_bv, axis=-1)
    ranks = jnp.arange(logits_bv.shape[1])[None, :]
    kept = jnp.where(ranks < numbers["top_k"], sorted_bv, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (ranks < numbers["top_k"]) & (before < numbers["top_p"])
    keep &= probabilities >= numbers["min_p"] * probabilities[:, :1]
    keep |= ranks == 0
    return jnp.where(keep, sorted_bv, jnp.inf).min(-1, keepdims=True)
