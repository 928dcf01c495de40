"""The plan room: what a run will need and take, before any weight loads. Pure: no GPU, no weights.

In: a `RunConfig`, a `Hardware` and a `ModelShape`. Out: a `RunPlan`: memory per phase, where it
goes, the activation policy of every layer, steps and time; and what to change if it does not fit.

shapes.py       config.json (or parameter shapes) -> ModelShape
hardware.py     this machine, or one that is described -> Hardware
settings.py     RunConfig -> the numbers that memory and time depend on
memory.py       bytes per phase and part
activations.py  bytes and FLOPs that a layer saves and repeats under each policy
speed.py        seconds per step
choose.py       policy per layer and pages on the GPU: the fastest mix that fits
plan.py         all of it together; what to change when it does not fit
screen.py       one screen and plan.json
"""
