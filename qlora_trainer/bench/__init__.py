"""Measures a training step on this machine: random weights of any configuration, so nothing is downloaded.

In: a `config.json`, adapter options and cells (shapes and policies). Out: tokens a second, memory,
and where the time goes.
"""
