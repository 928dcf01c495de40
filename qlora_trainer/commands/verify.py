"""Measure exports against the model that was trained, without making them again."""

from __future__ import annotations

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.jobs.verification import exports_folder, verify_exports


def run(config: RunConfig) -> None:
    """Verifies without exporting again.

    Raises:
        ConfigError: nothing has been exported.
        DivergedError: an export is over its bound.
    """
    root = exports_folder(config)
    found = {path.parent.name: path.parent for path in sorted(root.glob("*/export.json"))}
    if not found:
        raise ConfigError(f"{root}: nothing has been exported; run `export` first")
    verify_exports(config, found)
