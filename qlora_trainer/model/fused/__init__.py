"""The fused decoder: recognised layers run as hand-made autograd functions over `kernels/`.

parts.py       what a decoder layer is made of, once recognised
recognise.py   transformers/PEFT/bitsandbytes modules -> parts, or the reason why not
projection.py  a group of frozen products with their adapters: one extended weight, one call
layer.py       a decoder layer forward and backward, saving the least
keep.py        what a layer keeps between forward and backward, and where (the activation policy)
head.py        final norm, LM head and cross-entropy of supervised positions, in chunks
inputs.py      a `Batch` -> the tensors the decoder reads
decoder.py     embedding, layers, head: the callable `batch -> loss sum`
graph.py       the micro-step as a CUDA graph
"""
