"""Whole models, assembled from `jaxlm.nn`. A model offers pure `init`, `hidden`, `logits` and
`init_cache`, names its stacks of layers in `stacks`, and knows no mesh, no task and no file format.

Every array of a cache that has dimensions has the rows first.
"""
