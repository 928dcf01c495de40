"""The plan room: what a run will need and take, before any weight loads. Pure: no GPU, no weights.

In: a `RunConfig`, a `Hardware` and an `Architecture`. Out: a `RunPlan`: memory per phase, where it
goes, the activation policy of every layer, steps and time; and what to change if it does not fit.

architecture.py config.json -> the model's shape, as a run would hold and adapt it
shapes.py       a model without weights, and its adapters -> ModelShape
hardware.py     this machine, or one that is described -> Hardware
settings.py     RunConfig -> the numbers that memory and time depend on
memory.py       bytes per phase and part
fast_path.py, reference_path.py   what a layer keeps, needs and repeats under each activation policy
speed.py        seconds per step
choose.py       policy per layer and pages on the device: the fastest mix that fits
decide.py       that for given settings, and what follows: offload, phases, graphs, seconds
micro_batch.py  rows of a micro-batch under train.per_device_train_batch_size=auto
changes.py      what to set instead when nothing fits
plan.py         all of it together
screen.py       one screen and plan.json
"""
