"""The training room: the loop, the processes it runs in, and what can go wrong while it runs.

`loop` is the only caller of backward; `readback` brings numbers to the host without stopping the
device, and `record` says what is told of a step; `distributed` sums over ranks; `signals` and `health` end a
run the right way.
"""
