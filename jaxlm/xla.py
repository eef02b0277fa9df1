"""XLA's options that overlap collectives with compute: the one place where they are listed."""

import jax

# The scheduler that starts a transfer early and waits for it late; collectives of a loop (the
# layers, or accumulation) moved into the iteration before or after; and loops unrolled twice, so
# that the buffer being filled is not the one in use.
NVIDIA_OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
    "xla_gpu_enable_pipelined_p2p": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
}


def compiler_options(overlap: bool) -> dict[str, bool] | None:
    """What `jax.jit(compiler_options=)` gets: on NVIDIA, with `overlap`, the above."""
    return NVIDIA_OVERLAP if overlap and jax.default_backend() == "gpu" else None
