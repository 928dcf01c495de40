"""The run's page: it says what the files say, whatever they hold, and nothing in them can break out of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qlora_trainer.__main__ import main
from qlora_trainer.config.frozen import as_dict
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.jobs.page import refresh
from qlora_trainer.track.report import FILE, write_report
from qlora_trainer.track.report_headline import resumed_at
from qlora_trainer.track.report_series import CURVES, STRETCHES, WHOLE, Series
from qlora_trainer.train.signals import Status
from tests import tiny

PARTS = {"base weights": 3 << 30, "adapter": 1 << 28, "activations": 0}


def step(number: int, loss: Any = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "epoch": number / 100,
        "loss": loss,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens": 200,
        "supervised": 100,
        "tokens_per_second": 50.0,
        "batch": "00000000",
    } | more


def model(name: str, kl: float, **more: Any) -> dict[str, Any]:
    found = {
        "model": name,
        "passed": True,
        "failures": [],
        "tokens": 9,
        "perplexity": 1.5,
        "kl": kl,
        "top1": 1.0,
    }
    return found | more


def documents() -> dict[str, Any]:
    """A finished run's JSON files."""
    config = as_dict(RunConfig())
    config["model"]["model_name_or_path"] = "org/model"
    config["recipe"] = "smollm2_demo"
    config["lora"]["r"] = 7
    trained, base = model("trained model", 0.0), model("base alone", 3.25)
    return {
        "config.yaml": config,
        "plan.json": {
            "hardware": {"name": "A100", "device": "cuda"},
            "parameters": 8e9,
            "trainable": 2e6,
            "phases": [{"name": "load", "parts": PARTS}, {"name": "step", "parts": PARTS}],
            "host": {"process": 1 << 30},
            "peak_host": 1 << 30,
            "seconds_per_step": 2.0,
            "tokens_per_second": 100.0,
            "steps": 4,
            "margin": 0.05,
            "budget": 70 << 30,
            "notes": ["a note of the plan"],
            "peak_allocated": 10 << 30,
        },
        "status.json": {
            "state": "done",
            "message": "",
            "step": 4,
            "first_step": 2,
            "total_steps": 4,
            "exit_code": 0,
            "started": "2026-11-22T10:00:00+00:00",
            "updated": "2026-11-22T10:02:05+00:00",
            "command": "python -m qlora_trainer recipe=smollm2_demo lora.r=7",
            "versions": {"torch": "2.13.0"},
            "machine": {"device": "A100", "processes": 2, "CPU threads": 8},
            "measured": {"peak_host": 2 << 30, "peak_allocated": 11 << 30},
            "sessions": [
                {
                    "started": "2026-11-22T09:00:00+00:00",
                    "updated": "2026-11-22T09:01:00+00:00",
                    "state": "running",
                    "first_step": 0,
                    "step": 3,
                }
            ],
            "data": [
                {
                    "role": "training",
                    "sources": ["rows.jsonl"],
                    "formats": ["alpaca"],
                    "rows": 1200,
                    "dropped": {"no answer text": 17},
                    "notes": {"cut to train.max_length": 4},
                    "documents": 1183,
                    "tokens": 200_000,
                    "supervised": 50_000,
                    "longest": 512,
                }
            ],
        },
        "evaluation.json": {
            "held.jsonl": {
                "base": {"loss": 3.0, "perplexity": 20.1, "exact_match": 0.0},
                "tuned": {"loss": 0.5, "perplexity": 1.65, "exact_match": 0.75},
                "examples": [
                    {
                        "prompt": "What is 2+2?",
                        "reference": "4",
                        "base": "five",
                        "base_right": False,
                        "tuned": "4",
                        "tuned_right": True,
                    }
                ],
            }
        },
        "lm_eval.json": {"arc_easy": {"rows": 9, "metrics": {"acc": {"base": 0.3125, "tuned": 0.4375}}}},
        "metrics.jsonl": [step(1, 3.5), step(2, 3.0), step(3), step(4, 1.25), {"step": 4, "eval_loss": 1.5}],
        "exports/merged/export.json": {"format": "merged"},
        "exports/merged/verify.json": {
            "measured_on": "12 rows of held.jsonl",
            "models": [trained, base, model("merged", 0.0004, max_kl=0.01, bytes=273e6)],
        },
        "exports/nf4/export.json": {"format": "nf4"},
        "exports/nf4/verify.json": {
            "measured_on": "12 rows of held.jsonl",
            "models": [
                trained,
                base,
                model("nf4", 2.75, max_kl=0.5, passed=False, failures=["the tuning is lost"]),
            ],
        },
        "exports/gptq/export.json": {"format": "gptq"},
        "checkpoints/step-000004/manifest.json": {},
        "checkpoints/step-000004/state.json": {"step": 4, "tokens": 800, "best_step": 4, "best_loss": 1.5},
        "adapter/training.json": {},
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(yaml.safe_dump(content) if name.endswith(".yaml") else json.dumps(content))
    return folder


class Page(HTMLParser):
    """Tags, attributes, text by element, and the embedded curves."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.shown = ""
        self._inside = ""
        write_report(
            folder, defaults=as_dict(RunConfig()), recipe_values=lambda name: {"lora.lora_alpha": 16}
        )
        self.html = (folder / FILE).read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.shown += f" {data}"

    @property
    def text(self) -> str:
        return " ".join(self.shown.split())

    @property
    def chart(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def test_the_page_says_what_the_files_say(tmp_path):
    page = Page(write(tmp_path / "run", documents()))
    for said in (
        "run done step 4 of 4",
        "training loss 1.25 from 3.5",
        "exact match 75% base 0%",
        "3 min 5 s of work in 2 starts",
        "A100 × 2 8 CPU threads",
        "torch 2.13.0",
        "python -m qlora_trainer chat run=",
        "python -m qlora_trainer recipe=smollm2_demo lora.r=7",
        "step, median 2 s 4 s +100.0%",
        "GPU memory, peak 10.0 GiB 11.0 GiB +10.0%",
        "base weights 3.00 3.00",
        "a note of the plan",
        "rows.jsonl training, alpaca 1,200 17 1,183 200,000 25% 512",
        "no answer text dropped rows.jsonl 17",
        "What is 2+2? 4 five 4",
        "arc_easy acc 0.3125 0.4375",
        "base alone 3.2500",
        "merged passed 0.0004 0.01 100.0% 1.500 273",
        "nf4: the tuning is lost",
        "not verified: gptq",
        "checkpoints/step-000004 800 1.5, the best",
        "lora.r 7 64 command line",
    ):
        assert said in page.text, said
    assert page.chart["steps"] == [1, 2, 3, 4] and page.chart["resumed"] == [2]
    assert page.chart["columns"]["eval_loss"] == [None, None, None, 1.5]
    assert page.text.count("trained model") == 1  # one table for all exports measured alike


def test_a_fuller_result_and_the_latest_stand_beside_each_other(tmp_path):
    files = documents()
    scores = files["evaluation.json"]["held.jsonl"]
    files["evaluation.json"]["held.jsonl"] = scores | {
        "rows": 100,
        "latest": scores | {"rows": 10, "tuned": {"loss": 0.625, "exact_match": 0.5}, "examples": []},
    }
    verified = files["exports/merged/verify.json"]
    failed = {**verified["models"][2], "passed": False, "failures": ["it ends no answer"]}
    files["exports/merged/verify.json"] = verified | {
        "latest": {"measured_on": "3 rows of held.jsonl", "models": [*verified["models"][:2], failed]}
    }
    task = files["lm_eval.json"]["arc_easy"]
    files["lm_eval.json"]["arc_easy"] = task | {"latest": task | {"rows": 2}}
    page = Page(write(tmp_path / "run", files))
    for said in (
        "exact match 75% base 0%",  # the figure at the top is the fullest's
        "held-out rows, 100 of them: held.jsonl",
        "held-out rows, the latest 10: held.jsonl",
        "loss (nats per token) 3.0000 0.6250",
        "measured on 12 rows of held.jsonl",
        "measured on 3 rows of held.jsonl",
        "merged: it ends no answer",
        "arc_easy acc, the latest 2 0.3125 0.4375",
    ):
        assert said in page.text, said


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = Page(write(tmp_path, documents()))
    assert not page.attributes & {"src", "href", "srcset", "action"} and not page.tags["link"]
    assert "default-src 'none'" in page.html
    assert "Leon Sorokin" in page.html and "github.com/leeoniya/uPlot" in page.html  # uPlot's licence stays


HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\u2028'\""


def poisoned(value: Any) -> Any:
    """Every string is hostile, and every mapping has a hostile name more."""
    if isinstance(value, dict):
        numbers = all(isinstance(item, int | float) for item in value.values())
        return {key: poisoned(item) for key, item in value.items()} | {HOSTILE: 1 if numbers else HOSTILE}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return f"{value} {HOSTILE}" if isinstance(value, str) and not value.startswith("2026") else value


def test_nothing_in_the_files_can_break_out(tmp_path):
    calm = Page(write(tmp_path / "calm", documents()))
    files = {name: poisoned(content) for name, content in documents().items()}
    files["evaluation.json"][HOSTILE] = files["evaluation.json"].pop("held.jsonl")
    files["lm_eval.json"] = {HOSTILE: documents()["lm_eval.json"]["arc_easy"]}
    page = Page(write(tmp_path / f"run-{HOSTILE}".replace("/", "|"), files))
    assert "not as this version writes it" not in page.text, "a section gave up instead of escaping"
    assert page.tags["script"] == calm.tags["script"] == 3 and not page.tags["img"]
    assert page.attributes == calm.attributes
    assert "<img src=x onerror=alert(2)>{{ 7*7 }}" in page.text
    assert page.chart["steps"] == [1, 2, 3, 4]


def test_secrets_are_masked_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    token = "hf_" + "a1B2" * 8
    files = documents()
    files["status.json"] |= {"state": "failed", "message": f"could not reach https://u:{token}@hub"}
    files["config.yaml"]["data"]["path"] = f"https://{token}@hub/rows"
    files["evaluation.json"]["held.jsonl"]["examples"][0]["tuned"] = "correct-horse-battery"
    files["exports/nf4/verify.json"]["measured_on"] = token
    page = Page(write(tmp_path, files))
    assert token not in page.html and "correct-horse" not in page.html
    assert "***" in page.text


@pytest.mark.parametrize("missing", [None, *documents()])
def test_what_is_missing_is_left_out_and_the_rest_is_shown(tmp_path, missing):
    files = documents()
    kept = {"config.yaml": files["config.yaml"]} if missing is None else files
    if missing is not None:
        del files[missing]
    page = Page(write(tmp_path / "run", kept))
    assert (
        not page.tags["message"] and "could not be read" not in page.text and "not as this" not in page.text
    )
    assert ("Configuration" in page.text) == (missing != "config.yaml")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"a": 1}', b"null", b"[" * 99999])
@pytest.mark.parametrize("name", documents())
def test_a_broken_file_costs_its_part_and_never_the_page(tmp_path, name, content):
    folder = write(tmp_path / "run", documents())
    (folder / name).write_bytes(content)
    page = Page(folder)
    assert "Written" in page.text and page.text.startswith("run: ")


@pytest.mark.parametrize(
    "key", ["data", "sessions", "measured", "machine", "versions", "total_steps", "started"]
)
def test_a_status_of_another_version_is_named(tmp_path, key):
    files = documents()
    files["status.json"][key] = ["not", 1, "of ours"]
    page = Page(write(tmp_path, files))
    assert "Exports" in page.text and "Curves" in page.text


def test_a_half_written_line_is_left_out_and_said(tmp_path):
    folder = write(tmp_path, documents())
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')
    page = Page(folder)
    assert page.chart["steps"] == [1, 2, 3, 4] and "1 line is no record" in page.text


def test_steps_that_were_not_finite_are_marked(tmp_path):
    files = documents()
    files["metrics.jsonl"] = [step(1), step(2, "nan", grad_norm="inf", nonfinite=True), step(3)]
    files["status.json"] |= {"state": "failed", "exit_code": 3, "message": "not finite three steps in a row"}
    page = Page(write(tmp_path / "run", files))
    assert page.chart["nonfinite"] == [2] and page.chart["columns"]["loss"] == [2.0, None, 2.0]
    assert "run diverged step 4 of 4" in page.text and "not finite three steps in a row" in page.text
    assert "1 not finite" in page.text and "to go on" in page.text


def test_thinning_keeps_every_extreme_and_bounds_the_page(tmp_path):
    rng = np.random.default_rng(0)
    length = 60_000
    columns = {name: rng.normal(5.0, 0.1, length) for name in CURVES}
    for name, value in (("loss", 77.0), ("grad_norm", 88.0), ("tokens_per_second", 0.25)):
        columns[name][rng.integers(length)] = value
    records = [step(at + 1, **{name: float(columns[name][at]) for name in CURVES}) for at in range(length)]
    records[-1]["eval_loss"] = 1.5
    files = documents() | {"metrics.jsonl": records}
    page = Page(write(tmp_path, files))
    drawn = page.chart["columns"]
    assert WHOLE > len(page.chart["steps"]) > STRETCHES and page.chart["total"] == length
    assert page.chart["steps"][0] == 1 and page.chart["steps"][-1] == length
    for name in CURVES:
        assert max(drawn[name]) == pytest.approx(columns[name].max(), rel=1e-5)
        assert min(drawn[name]) == pytest.approx(columns[name].min(), rel=1e-5)
    assert drawn["eval_loss"][-1] == 1.5
    assert abs(np.median(drawn["smoothed"]) - 5.0) < 0.1  # of all steps, not of the extremes that were kept
    assert len(page.html) < 500_000


def test_a_short_run_is_drawn_whole():
    lines = [json.dumps(step(at)) for at in range(1, WHOLE + 1)]
    assert len(Series.of(lines).chart()["steps"]) == WHOLE
    assert len(Series.of([*lines, json.dumps(step(WHOLE + 1))]).chart()["steps"]) < WHOLE


def test_starts_are_remembered_from_one_to_the_next(tmp_path):
    path = tmp_path / "status.json"
    for first, last, code in ((0, 30, 75), (30, 40, 75), (40, 50, 0)):
        status = Status()
        status.write_to(path)
        status.note(first_step=first)
        status.tick(step=last)
        status.finish(code)
    found = json.loads(path.read_bytes())
    assert [session["first_step"] for session in found["sessions"]] == [0, 30]
    assert resumed_at(found) == [30, 40]
    status = Status()  # one that never reached a step leaves no session
    status.write_to(path)
    status.finish(2)
    again = Status()
    again.write_to(path)
    assert len(json.loads(path.read_bytes())["sessions"]) == 3


def test_starts_before_the_last_from_scratch_mark_nothing():
    start = {
        "started": "2026-11-22T10:00:00+00:00",
        "updated": "2026-11-22T10:00:00+00:00",
        "state": "stopped",
    }
    earlier = [start | {"first_step": first, "step": first + 9} for first in (0, 10, 20, 0, 7)]
    assert resumed_at({"sessions": earlier, "state": "running"}) == [7]


def test_a_disk_that_refuses_the_page_is_one_line_and_no_error(tmp_path, capsys):
    folder = write(tmp_path, documents())
    (folder / FILE).mkdir()
    refresh(folder)
    said = capsys.readouterr().err
    assert FILE in said and "Traceback" not in said
    assert sorted(path.name for path in folder.glob(".tmp-*")) == []


def test_the_page_can_be_remade_by_hand(tmp_path, capsys):
    folder = write(tmp_path / "run", documents())
    assert main(["report", f"run={folder}"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / FILE) and (folder / FILE).is_file()
    assert main(["report", f"run={tmp_path}"]) == 66 and main(["report"]) == 66


def test_a_run_that_diverged_has_its_page(tmp_path):
    tiny.save(tmp_path / "model")
    broken = tiny.model()
    broken.model.norm.weight.data.fill_(math.nan)
    broken.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"say {at}", "output": f"it is {at}!"} for at in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [
        "recipe=tiny",
        f"model.model_name_or_path={tmp_path / 'model'}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert main([*line, "train.max_steps=9"]) == 3
    page = (tmp_path / "run" / FILE).read_text()
    assert ">diverged<" in page and "not finite 3 steps in a row" in page


def test_a_folder_that_is_no_run_gets_no_page(tmp_path):
    refresh(tmp_path)
    assert list(tmp_path.iterdir()) == []
