"""The plan of a configuration on a machine, with what the data say where they can be read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qlora_trainer.config.frozen import with_values
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData
from qlora_trainer.errors import MissingInputError
from qlora_trainer.jobs import wiring
from qlora_trainer.jobs.fit import check_fit
from qlora_trainer.model.load import load_tokenizer, pick_device
from qlora_trainer.model.source import read_config, resolve
from qlora_trainer.plan import hardware, settings
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.changes import cheapest
from qlora_trainer.plan.decide import decide
from qlora_trainer.plan.plan import RunPlan, make_plan
from qlora_trainer.plan.settings import DataFacts
from qlora_trainer.system.terminal import console

READ_AT_ONCE = 64 << 20  # bytes
QUANTILES = 256  # of the documents' lengths, for the padding


def data_here(config: RunConfig) -> DataFacts | None:
    """What the data say, if they are files of a size that is read in seconds and the model has its tokenizer.

    Training finds them in the cache.
    """
    if config.data.path is None:
        return None
    sizes = [_size(source.path) for source in wiring.data_options(config).sources("train")]
    if None in sizes or sum(size or 0 for size in sizes) > READ_AT_ONCE:
        return None
    try:
        tokenizer = load_tokenizer(str(config.model.model_name_or_path), config.model.revision)
    except MissingInputError:
        return None
    data = wiring.load_data(config, tokenizer)
    if (limits := wiring.limits(config)) is not None:
        for line in check_fit(limits, [data], tokenizer):
            console.print(line, style="yellow")
    return facts_of(data)


def _size(source: str) -> int | None:
    """Bytes of a local file or folder; None of anything else."""
    path = Path(source).expanduser()
    if source.startswith("builtin:"):
        return 0
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else None


def plan_of(
    config: RunConfig,
    data: DataFacts | None = None,
    world_size: int = 1,
    rows: int | None = None,
    model: Architecture | None = None,
) -> RunPlan:
    """The plan of `config` on the machine that `plan.gpu` names, or on this one.

    `rows`: of a micro-batch, where the configuration says auto and the run has begun with some. `model`:
    what `architecture_of` gave, to build it once.

    Raises:
        MissingInputError: the model's config.json is not there.
        ConfigError: the model cannot be held or adapted so.
    """
    return make_plan(config, machine(config), model or architecture_of(config), data, world_size, rows)


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
    hardware_here, model = machine(config), architecture_of(config)
    shape = model.shape(config, hardware_here.device)
    asked = settings.from_config(config, hardware_here, shape, data, world_size)
    settled_now = {"model.offload": decide(shape, asked, hardware_here).settings.offload}
    found = cheapest(with_values(config, settled_now), hardware_here, model, data, world_size)
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
    return hardware.detect(pick_device(config.model.device).type, Path(str(config.output_dir)))


def architecture_of(config: RunConfig) -> Architecture:
    """The model of `config` before its weights.

    Raises:
        MissingInputError: its config.json is not there.
    """
    name, revision = str(config.model.model_name_or_path), config.model.revision
    return Architecture(read_config(name, revision), Path(resolve(name, revision)))


def check_model(config: RunConfig) -> Architecture:
    """What needs no weights, asked before anything takes time: targets, modules to save, what is quantized.

    Raises:
        MissingInputError, ConfigError: as `Architecture.shape`.
    """
    model = architecture_of(config)
    model.shape(config, machine(config).device)
    return model
