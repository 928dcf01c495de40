"""Show what the model will learn from: numbers, an example, and a page with every token of a batch."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData, load_tokenized, screen
from qlora_trainer.data.overlap import shared_documents
from qlora_trainer.data.page import write_page
from qlora_trainer.data.survey import Survey, survey
from qlora_trainer.jobs import wiring
from qlora_trainer.jobs.planning import facts_of, plan_of, settled
from qlora_trainer.model.load import load_tokenizer
from qlora_trainer.plan.settings import AUTO
from qlora_trainer.system.terminal import results
from qlora_trainer.train.distributed import Ranks


def run(config: RunConfig) -> None:
    """Tokenize (or read the cache), print the survey and write `inspect.html`; no weights are loaded."""
    name = config.model.model_name_or_path
    assert name is not None, "checked with the configuration"
    tokenizer = load_tokenizer(name, config.model.revision)
    ranks = Ranks(torch.device("cpu"))
    options = wiring.data_options(config)
    surveys: dict[str, Survey] = {}
    trained_on: TokenizedData | None = None
    for role in ("train", "eval") if options.has_eval else ("train",):
        data = load_tokenized(
            options, tokenizer, max_length=config.train.max_length, seed=config.seed, role=role
        )
        if config.train.per_device_train_batch_size == AUTO:
            config = settled(config, plan_of(config, facts_of(data), ranks.world_size))
        loader = wiring.train_loader(config, tokenizer, data, ranks)
        shared = shared_documents(trained_on, data) if trained_on is not None else 0
        surveys[role] = survey(data, loader, options, tokenizer, role=role, seed=config.seed, shared=shared)
        trained_on = data
    if not ranks.main:
        return
    screen.show(surveys, results)
    page = Path(config.output_dir or "outputs/inspect") / "inspect.html"
    write_page(surveys, config.recipe or Path(name).name, page)
    results.print(f"every token of the first batch: {page}", soft_wrap=True)
