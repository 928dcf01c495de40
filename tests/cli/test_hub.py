"""A base model and a dataset by their hub names, through the real clients and a small hub on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.hub import COMMIT, Hub, serving

LINE = ["recipe=tiny", "model.model_name_or_path=someone/tiny", "data.path=someone/rows", "train.max_steps=2"]
# The clients read HF_ENDPOINT when they are imported: a process of its own, in which all commands run.
DRIVER = """
import json, sys
from qlora_trainer.__main__ import main
for line in json.loads(sys.argv[1]):
    code = main(line)
    print(json.dumps(["ended", code]), file=sys.stderr, flush=True)
"""


class Ending(NamedTuple):
    code: int
    error: str


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "gated-tiny"):
        tiny.save(root / "models" / "someone" / name)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} it is"} for i in range(40)]
    for name in ("rows", "gated-rows"):
        file = root / "datasets" / "someone" / name / "train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(root) as server:
        yield server


def run(hub: Hub, folder: Path, *lines: list[str]) -> list[Ending]:
    """How each command line ended; `folder` holds the caches and is where they run."""
    environment = hub.environment(folder) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", DRIVER, json.dumps(lines)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    endings, errors = [], []
    for text in result.stderr.splitlines():
        if text.startswith('["ended"'):
            endings.append(Ending(json.loads(text)[1], "\n".join(errors)))
            errors = []
        elif text.startswith("error: "):
            errors.append(text)
    return endings


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_model_and_data_of_the_hub_train_streamed_or_not_and_again_without_network(
    hub: Hub, tmp_path: Path
) -> None:
    downloaded, streamed, pinned = run(
        hub,
        tmp_path,
        [*LINE, "output_dir=downloaded"],
        [*LINE, "output_dir=streamed", "data.streaming=true"],
        [*LINE, "output_dir=pinned", f"model.revision={COMMIT}", "data.revision=v1"],
    )
    assert downloaded == streamed == pinned == Ending(0, "")
    assert ("GET", "/someone/tiny/resolve/main/model.safetensors") in hub.asked
    assert len(losses(tmp_path / "downloaded")) == 2
    assert losses(tmp_path / "downloaded") == losses(tmp_path / "streamed") == losses(tmp_path / "pinned")
    hub.reachable = False
    try:
        again, never = run(
            hub, tmp_path, [*LINE, "output_dir=again"], [*LINE, "data.path=someone/else", "output_dir=never"]
        )
    finally:
        hub.reachable = True
    assert again == Ending(0, "") and losses(tmp_path / "again") == losses(tmp_path / "downloaded")
    assert never.code == 66 and "the hub cannot be reached" in never.error


REFUSED = {
    "model.model_name_or_path=someone/gated-tiny": "someone/gated-tiny is gated: accept its terms",
    "model.model_name_or_path=someone/none": "no such model on the hub (or it is private: set HF_TOKEN)",
    "model.revision=v9": "someone/tiny has no revision v9: check model.revision",
    "data.path=someone/gated-rows": "someone/gated-rows is gated: accept its terms",
    "data.path=someone/none": "no dataset of that name on the hub that you may read (if it is private",
    "data.revision=v9": "someone/rows has no revision v9: check data.revision",
}


def test_what_the_hub_refuses_is_told_in_one_line(hub: Hub, tmp_path: Path) -> None:
    cases = [(*case, []) for case in REFUSED.items()]
    cases += [
        (key, text, ["data.streaming=true"]) for key, text in REFUSED.items() if key.startswith("data.")
    ]
    lines = [[*LINE, key, *more, f"output_dir=run{i}"] for i, (key, _, more) in enumerate(cases)]
    for (key, text, more), ending in zip(cases, run(hub, tmp_path, *lines), strict=True):
        assert ending.code == 66 and text in ending.error and "\n" not in ending.error, (key, more, ending)
