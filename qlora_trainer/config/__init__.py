"""The configuration room: a recipe and a command line come in, one frozen and checked `RunConfig` goes out.

schema.py     every key, its type and default      keys.py       what to say about any other name
facts.py      what a key means, and for whom        effect.py     which keys that were set change nothing
recipes.py    finding and reading recipes           load.py       composing them with Hydra
checks.py     values, ranges, contradictions        preflight.py  what this machine lacks, before torch
claim.py      a run's folder and its config.yaml    identity.py   which keys make it the same run
frozen.py     what others are handed
"""
