"""jaxlm: train, run and export language models in JAX, sharded over a device mesh."""
