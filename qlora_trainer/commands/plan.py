"""Say what a run will need and take; neither a GPU nor weights are needed."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import CheckpointError
from qlora_trainer.jobs.planning import check_model, data_here, plan_of
from qlora_trainer.plan import screen
from qlora_trainer.plan.plan import check
from qlora_trainer.system.terminal import results


def run(config: RunConfig) -> None:
    """Print the plan and write plan.json; where a run has its own, plan-preview.json.

    Raises:
        ConfigError: the run cannot fit; after the plan has been shown.
        CheckpointError: output_dir cannot be written to.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    model = check_model(config)
    plan = plan_of(config, data_here(config), config.plan.num_processes or launched, model=model)
    if int(os.environ.get("RANK", "0")) == 0:
        screen.show(plan, results)
        folder = Path(config.output_dir or "outputs/plan")
        path = folder / ("plan-preview.json" if (folder / "config.yaml").exists() else "plan.json")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            screen.write(plan, path)
        except OSError as error:
            raise CheckpointError(
                f"output_dir: {path}: {error.strerror}; set output_dir elsewhere"
            ) from error
        results.print(f"every number: {path}", style="dim", soft_wrap=True)
    check(plan)
