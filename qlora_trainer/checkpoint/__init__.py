"""Checkpoints: what they are (`format`), how they reach the disk whole (`publish`), how a run finds its way
back (`resume`), and the random number generators' states (`rng`).

The room knows folders of safetensors and JSON. It imports neither the model nor the loop: they hand
it tensors and plain dictionaries and get the same back, bit for bit.
"""
