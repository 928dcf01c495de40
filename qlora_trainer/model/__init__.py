"""The model room: a quantized, frozen base; adapters on it; one callable that turns a batch into a loss.

`source` finds the files, `load` builds the base, `lora` attaches the adapter, `forward` is the
reference path through unmodified transformers modules and `fuse` the fast one. `linears` says what is
quantized, `targets` where adapters go, `outline` both of a model whose weights nobody has read.
"""
