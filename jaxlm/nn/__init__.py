"""Flax modules.

Dimensions are named by one letter, everywhere, as suffixes (`x_btd`) and in einsum strings:

B batch (rows), T target length, S source or key length, D model, N query heads,
K key/value heads, G query heads per key/value head, H head, F feed-forward, V vocabulary,
L layers, Z gates of a recurrent cell.
"""
