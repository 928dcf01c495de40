"""`train.per_device_train_batch_size=auto`: how many of an optimizer step's rows run together.

In: the configuration, the machine, the model, the data's lengths. Out: rows of a micro-batch. The rows of a
step on each device are fixed (`train.gradient_accumulation_steps`), and with them the tokens and the
gradient, which is normalised over the whole step. What is chosen is a pure function of what comes in.
"""

from __future__ import annotations

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.plan import settings
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.choose import assumed
from qlora_trainer.plan.decide import decide
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.settings import DataFacts

AS_FAST = 1.01  # times the fastest step: not worth the memory of more rows


def pick(
    config: RunConfig,
    hardware: Hardware,
    architecture: Architecture,
    data: DataFacts | None = None,
    world_size: int = 1,
) -> int:
    """The fewest rows with which a step is as fast as with any other number that divides it and fits.

    On a card whose speed is not known, by the speed that `choose` assumes. 1 if nothing fits.
    """
    machine = assumed(hardware)
    shape = architecture.shape(config, hardware.device)
    seconds: dict[int, float] = {}
    for rows in divisors(config.train.gradient_accumulation_steps):
        asked = settings.from_config(config, machine, shape, data, world_size, rows)
        found = decide(shape, asked, machine)
        if found.fits:
            assert found.seconds is not None, "the machine's speed is assumed where it is not known"
            seconds[rows] = found.seconds
    fastest = min(seconds.values(), default=0.0)
    return next((rows for rows, time in seconds.items() if time <= AS_FAST * fastest), 1)


def divisors(number: int) -> list[int]:
    """From 1 to `number`, ascending."""
    return [rows for rows in range(1, number + 1) if number % rows == 0]
