"""Whole models, assembled from `jaxlm.nn`. A model offers pure `init`, `hidden`, `logits` and
`init_cache`, and knows no mesh, no task and no file format.
"""
