"""The fused decoder: described layers run as hand-made autograd functions over `kernels/`.

spec.py             what a model is made of, as plain values, which plan and run share
describe.py         transformers/PEFT/bitsandbytes modules, with or without weights -> spec, or why not
bind.py             spec and the modules it is of -> parts
parts.py            what a decoder layer computes with
norm.py             RMSNorm with the residual's addition inside
attention.py        the attention block: forward, backward, what it keeps, its bytes
mlp.py              the gated MLP block, likewise
projection.py       a group of frozen products with their adapters: one extended weight, one call
projection_fp8.py   the same in e4m3
adapter_columns.py  activations with spare columns for their projection on the adapters
workspace.py        where codes come from, and where dequantized weights stand
activations.py      activation policies: what is recomputed, and what waits in host memory
layer.py            a decoder layer: its blocks as one node of autograd
head.py             final norm, LM head and cross-entropy of supervised positions, in chunks
rotary.py           position ids -> sines and cosines
inputs.py           a `Batch` -> the tensors the decoder reads
call.py             what one pass gives every layer
decoder.py          embedding, layers, head: the callable `batch -> TokenNll`
graph.py            the micro-step as a CUDA graph
"""
