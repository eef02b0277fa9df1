"""The options that XLA compiles with on a mesh: the one place where they are listed."""

import functools
import os

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


# Where two chains of collectives do not depend on each other, such as a metric's loop and the
# backward pass, XLA's CPU devices may take them in different orders, and wait for each other for
# ever, unless instructions keep the order they have.
# `compiler_options` does not reach this one.
CPU_IN_ORDER = "xla_cpu_enable_concurrency_optimized_scheduler"
# Nor is the end of a loop waited for by a collective that needs nothing of it, such as one for the
# decoder's parameters behind the encoder's loop. A device then waits in two threads at once: there
# have to be that many, and not the one for each core that XLA would have. More cost time: with 64
# for eight devices on two cores, steps take a quarter longer.
CPU_THREADS, THREADS_FOR_A_DEVICE = "PJRT_NPROC", 2


def keep_order_on_cpu(devices: int) -> None:
    """Make so many CPU devices take collectives in one order, if JAX has not started yet, and let
    them wait for several at once.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if CPU_IN_ORDER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{CPU_IN_ORDER}=false".strip()
    os.environ.setdefault(CPU_THREADS, str(THREADS_FOR_A_DEVICE * devices))


def compiler_options(overlap: bool) -> dict[str, bool] | None:
    """What `jax.jit(compiler_options=)` gets: on NVIDIA, with `overlap`, the above.

    An option that this version of XLA lacks is left out: speed may depend on it, numbers do not.
    """
    if not overlap or jax.default_backend() != "gpu":
        return None
    return {name: value for name, value in NVIDIA_OVERLAP.items() if is_known(name, value)}


@functools.cache
def is_known(name: str, value: bool) -> bool:
    """Whether the installed XLA takes an option."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
