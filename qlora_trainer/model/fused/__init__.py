"""The fused decoder: described layers run as hand-made autograd functions over `kernels/`.

spec.py        what a model is made of, as plain values, which plan and run share
describe.py    transformers/PEFT/bitsandbytes modules, with or without weights -> spec, or the reason why not
bind.py        spec and the modules it is of -> parts
parts.py       what a decoder layer computes with
projection.py  a group of frozen products with their adapters: one extended weight, one call
layer.py       a decoder layer forward and backward, saving the least
keep.py        what a layer keeps between forward and backward, and where (the activation policy)
head.py        final norm, LM head and cross-entropy of supervised positions, in chunks
rotary.py      position ids -> sines and cosines
inputs.py      a `Batch` -> the tensors the decoder reads
decoder.py     embedding, layers, head: the callable `batch -> loss sum`
graph.py       the micro-step as a CUDA graph
"""
