"""`plan`: what a run will need and take; neither a GPU nor weights are needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.watch import with_values
from qlora_trainer.plan import hardware, screen, settings, shapes
from qlora_trainer.plan.changes import cheapest
from qlora_trainer.plan.decide import decide
from qlora_trainer.plan.plan import RunPlan, check, make_plan
from qlora_trainer.plan.settings import DataFacts

if TYPE_CHECKING:
    from qlora_trainer.data import TokenizedData

QUANTILES = 256  # of the documents' lengths, for the padding


def run(config: RunConfig) -> None:
    """Print the plan and write plan.json.

    Raises:
        ConfigError: the run cannot fit; after the plan has been shown.
    """
    plan = plan_of(config)
    screen.show(plan, Console())
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    screen.write(plan, folder / "plan.json")
    check(plan)


def plan_of(
    config: RunConfig, data: DataFacts | None = None, world_size: int = 1, rows: int | None = None
) -> RunPlan:
    """The plan of `config` on the machine that `plan.gpu` names, or on this one.

    `rows`: of a micro-batch, where the configuration says auto and the run has begun with some.

    Raises:
        MissingInputError: the model's config.json is not there.
    """
    return make_plan(config, machine(config), shape_of(config), data, world_size, rows)


def settled(config: RunConfig, plan: RunPlan) -> RunConfig:
    """`config` with the plan's micro-batch in the place of `auto`."""
    return with_values(
        config,
        {
            "train.per_device_train_batch_size": plan.rows,
            "train.gradient_accumulation_steps": plan.accumulation,
        },
    )


def remedies(config: RunConfig, data: DataFacts | None = None, world_size: int = 1) -> list[str]:
    """Overrides with which `config` needs less than planned, the mildest first: for a plan that was wrong."""
    hardware_here, shape = machine(config), shape_of(config)
    asked = settings.from_config(config, hardware_here, shape, data, world_size)
    found = cheapest(shape, decide(shape, asked, hardware_here).settings, hardware_here)
    return [f"{change.overrides} (peak {change.peak / 2**30:.1f} GiB)" for change in found]


def facts_of(data: TokenizedData) -> DataFacts:
    """What the plan needs of data that has been read: one epoch's documents, repeats included."""
    tokens = max(1, round(float((data.lengths * data.repeats).sum())))
    ascending = np.argsort(data.lengths, kind="stable")
    seen = np.cumsum(data.repeats[ascending])
    middles = (np.arange(QUANTILES) + 0.5) / QUANTILES * seen[-1]
    places = np.minimum(np.searchsorted(seen, middles), len(ascending) - 1)
    return DataFacts(
        documents=max(1, round(float(seen[-1]))),
        tokens=tokens,
        supervised=round(tokens * data.n_supervised / data.n_tokens),
        longest=int(data.lengths.max()),
        lengths=tuple(int(length) for length in data.lengths[ascending][places]),
    )


def machine(config: RunConfig) -> hardware.Hardware:
    """What `plan.gpu` describes, else the device that the run would take here."""
    if config.plan.gpu is not None:
        return hardware.parse(config.plan.gpu)
    from qlora_trainer.model.load import pick_device

    return hardware.detect(pick_device(config.model.device).type, Path(str(config.output_dir)))


def shape_of(config: RunConfig) -> shapes.ModelShape:
    from qlora_trainer.model.source import read_config, resolve

    name = str(config.model.model_name_or_path)
    folder = Path(resolve(name, config.model.revision))
    if folder.is_dir():
        return shapes.from_folder(folder)
    return shapes.from_config(read_config(name, config.model.revision))
