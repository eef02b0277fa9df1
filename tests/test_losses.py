"""Blocked cross-entropy against PyTorch's, and what blocks are for: memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.losses import Objective, blocked_cross_entropy, blocked_token_nll, usual_block
from jaxlm.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("strict")

BATCH, LENGTH, D_MODEL, VOCAB = 2, 11, 6, 17
Z_LOSS = 0.01


def inputs():
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(BATCH, LENGTH, D_MODEL)).astype(np.float32)
    head = generator.normal(size=(D_MODEL, VOCAB)).astype(np.float32)
    targets = generator.integers(0, VOCAB, (BATCH, LENGTH), np.int32)
    weights = generator.choice([0.0, 1.0, 0.5], (BATCH, LENGTH)).astype(np.float32)
    return hidden, head, targets, weights


def our_loss(hidden, head, targets, weights, block, smoothing=0.0):
    objective = Objective(times, block, Z_LOSS, smoothing)
    total, sums = blocked_cross_entropy(objective, head, hidden, targets, weights)
    return total / sums.weight


def times(head, hidden):
    return hidden @ head


def their_loss(hidden, head, targets, weights, smoothing=0.0):
    logits = hidden @ head
    nats = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCAB),
        targets.reshape(-1).long(),
        reduction="none",
        label_smoothing=smoothing,
    ).reshape(targets.shape)
    z = torch.logsumexp(logits, -1).square()
    return ((nats + Z_LOSS * z) * weights).sum() / weights.sum()


@pytest.mark.parametrize(("block", "smoothing"), [(1, 0.0), (4, 0.1), (11, 0.0), (64, 0.2)])
def test_value_and_gradient_are_those_of_pytorch(block, smoothing):
    hidden, head, targets, weights = inputs()
    leaves = [torch.tensor(x, requires_grad=True) for x in (hidden, head)]
    theirs = their_loss(*leaves, torch.tensor(targets), torch.tensor(weights), smoothing)
    theirs.backward()
    ours, gradients = jax.jit(
        jax.value_and_grad(our_loss, argnums=(0, 1)), static_argnames=("block", "smoothing")
    )(hidden, head, targets, weights, block=block, smoothing=smoothing)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-6)


@pytest.mark.parametrize("block", [4, 64])
def test_each_token_has_its_own_loss_in_its_own_place(block):
    hidden, head, targets, _ = inputs()
    ours = blocked_token_nll(jnp.asarray(hidden), lambda h: h @ head, targets, block)
    logits = torch.tensor(hidden @ head).movedim(-1, 1)
    theirs = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets).long(), reduction="none"
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_no_target_at_all_gives_zero_sums():
    hidden, head, targets, weights = inputs()
    total, sums = blocked_cross_entropy(
        Objective(times, 4), jnp.asarray(head), jnp.asarray(hidden), targets, np.zeros_like(weights)
    )
    assert total == sums.nats == sums.z == sums.weight == 0


def test_large_logits_stay_finite():
    hidden, head, targets, weights = inputs()
    value, gradient = jax.value_and_grad(our_loss)(hidden * 1e4, head, targets, weights, 4)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_blocks_save_the_memory_of_the_logits():
    length, vocab = 256, 4096
    arguments = (
        jax.ShapeDtypeStruct((4, length, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32),
        jax.ShapeDtypeStruct((4, length), jnp.int32),
        jax.ShapeDtypeStruct((4, length), jnp.float32),
    )

    def temporary_bytes(block):
        gradient = jax.jit(jax.grad(our_loss, argnums=(0, 1)), static_argnames="block")
        compiled = gradient.lower(*arguments, block=block).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * length * vocab * 4
    assert temporary_bytes(length) >= logits
    assert temporary_bytes(16) < logits / 4


def test_where_nobody_says_a_gpus_block_has_logits_of_a_gibibyte(monkeypatch):
    rows, vocab_size = 8, 2**16
    assert usual_block(rows, vocab_size) == 64
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert usual_block(rows, vocab_size) == 2**30 // (4 * vocab_size * rows) == 512
    assert usual_block(rows, 2**21) == 64
    meshes = {"dp4,tp2": 4 * 512, "fsdp2,cp4": 8 * 512, "pp2,dp4": 8 * 512}
    for mesh, block in meshes.items():
        with jax.set_mesh(make_mesh(mesh)):
            assert usual_block(rows, vocab_size) == block
