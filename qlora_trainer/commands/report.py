"""Make a run's page, report.html, anew from the files in its folder; finished or not."""

from __future__ import annotations

from pathlib import Path

from qlora_trainer.config.claim import CONFIG_FILE
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import MissingInputError
from qlora_trainer.jobs import page


def run(config: RunConfig) -> None:
    """Prints where the page is. It may be made while the run is at work.

    Raises:
        MissingInputError: no run is there.
    """
    folder = config.run or config.output_dir
    if folder is None or not (Path(folder) / CONFIG_FILE).is_file():
        raise MissingInputError("run: report needs the folder of a run, e.g. run=outputs/NAME")
    print(page.write(Path(folder)))
