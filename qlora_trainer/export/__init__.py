"""The export room: what was trained leaves as files that others read, and is measured after reloading.

`adapter` writes the PEFT adapter, `merge` the whole model shard by shard, `quantize` and `gguf` the
smaller ones, `verify` reloads each in a fresh process and compares it with the model that was
trained, `card` says all that in prose. Every folder appears whole or not at all (`staging`).
"""
