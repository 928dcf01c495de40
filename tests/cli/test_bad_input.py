"""Every mistake a user can make ends in one line that names the key and says what to do."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_trainer.__main__ import main
from tests import tiny

MODEL = "recipe=tiny model.model_name_or_path=model"
READY = f"{MODEL} data.path=rows.jsonl"


@dataclass(frozen=True)
class Case:
    line: str  # the command line behind `python -m qlora_trainer`
    code: int
    says: tuple[str, ...]  # what the line must contain: the key, and what to do


def case(line: str, code: int, *says: str) -> Case:
    return Case(line, code, says)


COMMANDS = [
    case("trian recipe=tiny", 2, "trian", "did you mean train?"),
    case("tiny", 2, "tiny", "recipe=tiny"),
    case("train recipe=tiny smollm2_demo", 2, "smollm2_demo", "key=value"),
    case("--learning_rate 1e-4", 2, "--learning_rate", "train.learning_rate"),
    case("--train.max_steps=3", 2, "write train.max_steps=3"),
    case("--config-dir=/tmp recipe=tiny", 2, "--config-dir", "unknown option"),
    case("--experimental-rerun=job.pickle", 2, "--experimental-rerun", "refused", "unpickles"),
    case("-m train output_dir=o lora.r=8,16 " + READY, 2, "output_dir", "several runs of the sweep"),
    case("-m train 'train.learning_rate=interval(0,1)' " + READY, 2, "interval", "can be counted"),
]

NAMES = [
    case(f"{READY} train.max_step=3", 2, "train.max_step:", "did you mean train.max_steps?"),
    case(f"{READY} evaluate.generate=true", 2, "evaluate.generate:", "evaluate has enabled, eval_steps"),
    case(f"{READY} train.batchsize=3", 2, "train.batchsize:", "did you mean train.per_device_train_batch"),
    case(f"{READY} +optim.lrr=1", 2, "optim.lrr", "did you mean train.learning_rate?"),
    case(f"{READY} ++lora.rr=1", 2, "lora.rr", "did you mean lora.r?"),
    case(f"{READY} lora/r=1", 2, "lora/r", "did you mean lora.r?"),
    case(f"{READY} learning_rate=1e-4", 2, "learning_rate", "did you mean train.learning_rate?"),
    case(f"{READY} lora=16", 2, "lora:", "is a section", "lora.r"),
    case(f"{READY} ~lora.r", 2, "lora.r", "cannot be removed"),
    case(f"{READY} lora@model.r=1", 2, "@package is not used"),
    case(f"{READY} hydra.run.dir=/tmp/x", 2, "hydra.run.dir", "drop it"),
    case(f"{READY} +model._target_=os.system", 2, "_target_", "refused"),
    case(f"{READY} '+data.path={{_target_: os.system}}'", 2, "data.path", "_target_ refused"),
    case(f"{READY} max_steps", 2, "max_steps", "key=value"),
    case(f"{READY} data.path=[a", 2, "data.path", "quotes"),
    case(f"{READY} lora.r=8,16", 2, "lora.r", "-m"),
    *(
        case(f"{READY} {alias}", 2, alias.partition("=")[0], f"here it is {ours}")
        for alias, ours in {
            "base_model=x": "model.model_name_or_path",
            "lora_rank=8": "lora.r",
            "micro_batch_size=2": "train.per_device_train_batch_size",
            "batch_size=2": "train.per_device_train_batch_size",
            "cutoff_len=512": "train.max_length",
            "sequence_len=512": "train.max_length",
            "lr=1": "train.learning_rate",
            "train.lr=1": "train.learning_rate",
            "num_epochs=1": "train.num_train_epochs",
            "val_set_size=0.1": "data.eval_fraction",
            "gradient_checkpointing=true": "train.activations",
            "load_in_4bit=true": "quantization.method=nf4",
            "bf16=true": "model.dtype=bfloat16",
        }.items()
    ),
]

VALUES = [
    case(f"{READY} lora.r=many", 2, "lora.r", "'many'", "a whole number"),
    case(f"{READY} train.packing=perhaps", 2, "train.packing", "true or false"),
    case(f"{READY} track.report_to=wandb", 2, "track.report_to", "a list [a,b]"),
    case(f"{READY} lora.r=null", 2, "lora.r", "not Optional"),
    case(f"{READY} lora.r=???", 2, "lora.r", "'???'"),
    case(f"{READY} 'train.max_steps=${{steps}}'", 2, "train.max_steps", "steps"),
    case(f"{READY} lora.r=0", 2, "lora.r", "0", "from 1"),
    case(f"{READY} train.learning_rate=2", 2, "train.learning_rate", "from 0 to 1"),
    case(f"{READY} train.learning_rate=0", 2, "train.learning_rate", "more than 0"),
    case(f"{READY} train.learning_rate=nan", 2, "train.learning_rate", "nan"),
    case(f"{READY} train.max_steps=0", 2, "train.max_steps", "-1"),
    case(f"{READY} lora.lora_dropout=1", 2, "lora.lora_dropout", "0.99"),
    case(f"{READY} optim.adam_beta2=1", 2, "optim.adam_beta2", "below 1"),
    case(f"{READY} quantization.method=nf3", 2, "quantization.method", "did you mean nf4?"),
    case(f"{READY} optim.name=adamw_torch", 2, "optim.name", "paged_adamw_32bit"),
    case(f"{READY} train.lr_scheduler_type=cosin", 2, "train.lr_scheduler_type", "did you mean cosine?"),
    case(f"{READY} track.report_to=[wnadb]", 2, "track.report_to", "did you mean wandb?"),
    case(f"{READY} export.format=[ggml]", 2, "export.format", "gguf"),
    case(f"{READY} data.format=alpacca", 2, "data.format", "did you mean alpaca?"),
    case(f"{READY} data.eval_fraction=1.5", 2, "data.eval_fraction", "less than 1"),
    case(f"{READY} lora.init_lora_weights=gausian", 2, "lora.init_lora_weights", "did you mean gaussian?"),
    case(f"{READY} lora.target_modules=7", 2, "lora.target_modules", "all-linear"),
    case(f"{READY} checkpoint.resume_from_checkpoint=true", 2, "resume_from_checkpoint", "auto"),
]

CONFLICTS = [
    case(f"{READY} train.packing=true train.group_by_length=true", 2, "group_by_length", "packing"),
    case(f"{READY} data.eval_path=rows.jsonl data.eval_fraction=0.1", 2, "data.eval_fraction", "set one"),
    case(f"{READY} quantization.method=int8 quantization.bnb_4bit_compute_dtype=bfloat16", 2, "int8"),
    case(f"{READY} model.dtype=float16", 2, "model.dtype", "bfloat16"),
    case(f"{READY} quantization.bnb_4bit_compute_dtype=float16", 2, "compute_dtype", "bfloat16"),
    case(f"{READY} lora.dtype=float16", 2, "lora.dtype", "bfloat16"),
    case(f"{READY} model.trust_remote_code=true", 2, "model.revision", "commit hash"),
    case(f"{READY} model.trust_remote_code=true model.revision=main", 2, "commit hash"),
    case(f"{READY} lora.init_lora_weights=pissa", 2, "lora.init_lora_weights", "quantization.method=none"),
    case(f"{READY} lora.target_modules=[up] lora.modules_to_save=[up]", 2, "modules_to_save", "one of the"),
    case(f"{READY} evaluate.enabled=true evaluate.task=exact_match", 2, "evaluate.task", "data.eval_path"),
    case(f"{READY} evaluate.enabled=true evaluate.eval_steps=5", 2, "evaluate.eval_steps", "data.eval_path"),
    case(f"{READY} data.overlong=split", 2, "data.overlong", "train.packing=true"),
    case("train recipe=tiny run=finished", 2, "run:", "drop one"),
    case("train run=finished", 2, "run:", "output_dir"),
    case("recipe=tiny recipe=smollm2_demo", 2, "recipe: given 2 times"),
]

MISSING = [
    case("recipe=smollm2_dem", 66, "recipe:", "did you mean smollm2_demo?"),
    case("recipe=no/such.yaml", 66, "recipe:", "no/such.yaml"),
    case("recipe=tiny data.path=rows.jsonl", 2, "model.model_name_or_path: not set", "name a folder"),
    case(MODEL, 2, "data.path: not set", "name a file"),
    case("model.model_name_or_path=model data.path=rows.jsonl", 2, "output_dir", "output_dir=outputs/NAME"),
    case(
        "recipe=tiny model.model_name_or_path=./modle data.path=rows.jsonl", 66, "model_name_or_path", "modle"
    ),
    case("recipe=tiny model.model_name_or_path=./rows.jsonl data.path=rows.jsonl", 66, "model_name_or_path"),
    case("recipe=tiny model.model_name_or_path=empty data.path=rows.jsonl", 66, "not a model folder"),
    case("recipe=tiny model.model_name_or_path=no/where data.path=rows.jsonl", 66, "no/where", "/a/folder"),
    case(f"{MODEL} data.path=rows.json", 66, "data.path", "did you mean rows.jsonl?"),
    case(f"{MODEL} data.path=/no/such/rows.json", 66, "data.path", "nor does the folder"),
    case(f"{READY} data.eval_path=held.jsonl", 66, "data.eval_path", "held.jsonl"),
    case("chat", 2, "run:", "run=outputs/NAME"),
    case("chat run=nowhere", 66, "run:", "config.yaml"),
]

RECIPES = [
    case("recipe=unknown.yaml", 2, "unknown.yaml:3: train.lr", "here it is train.learning_rate"),
    case("recipe=broken.yaml", 2, "broken.yaml:3: broken YAML"),
    case("recipe=list.yaml", 2, "list.yaml", "sections with keys"),
    case("recipe=circle.yaml", 2, "inherits itself"),
    case("recipe=orphan.yaml", 66, "orphan.yaml: defaults", "did you mean tiny?"),
    case("recipe=target.yaml", 2, "target.yaml:1: model._target_", "refused"),
    case("recipe=binary.yaml", 2, "binary.yaml", "UTF-8"),
]
RECIPE_FILES = {
    "unknown.yaml": b"defaults: [tiny, _self_]\ntrain:\n  lr: 1e-4\n",
    "broken.yaml": b"train:\n  max_steps: [1\n",
    "list.yaml": b"- train\n",
    "circle.yaml": b"defaults: [circle.yaml, _self_]\n",
    "orphan.yaml": b"defaults: [tinny, _self_]\n",
    "target.yaml": b"model: {_target_: os.system}\n",
    "binary.yaml": b"train: \xff\xfe\n",
}

FOLDERS = [
    case(f"{READY} output_dir=rows.jsonl", 2, "output_dir", "is a file"),
    case(f"{READY} output_dir=rows.jsonl/run", 74, "output_dir", "; set "),
    case(f"{READY} output_dir=/proc/run", 74, "output_dir", "; set "),
    case(f"{READY} output_dir=model", 2, "output_dir", "no run's"),
    case(f"{READY} output_dir=finished", 2, "output_dir", "another configuration", "model.model_name"),
]

DATA = [
    case(f"{MODEL} data.path=empty.jsonl", 65, "empty.jsonl"),
    case(f"{MODEL} data.path=broken.jsonl", 65, "broken.jsonl:2", "JSON"),
    case(f"{MODEL} data.path=columns.jsonl", 65, "columns.jsonl", "question"),
    case(f"{MODEL} data.path=rows.pdf", 65, "rows.pdf"),
]
DATA_FILES = {
    "rows.jsonl": '{"instruction": "Say hi", "input": "", "output": "hi"}\n' * 4,
    "empty.jsonl": "",
    "broken.jsonl": '{"instruction": "Say hi", "output": "hi"}\n{"instruction": \n',
    "columns.jsonl": '{"question": "Say hi", "reply": "hi"}\n',
    "rows.pdf": "%PDF",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, data good and bad, recipes good and bad, a run of another configuration."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny.save(folder / "model")
    (folder / "empty").mkdir()
    for name, text in DATA_FILES.items():
        (folder / name).write_text(text)
    for name, content in RECIPE_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "finished").mkdir()
    (folder / "finished" / "metrics.jsonl").write_text("{}\n")
    (folder / "finished" / "config.yaml").write_text("recipe: tiny\ndata: {path: other.jsonl}\n")
    return folder


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "bad",
    [*COMMANDS, *NAMES, *VALUES, *CONFLICTS, *MISSING, *RECIPES, *FOLDERS, *DATA],
    ids=lambda bad: bad.line.replace(READY, "…").replace(MODEL, "…")[:60],
)
def test_bad_input_ends_in_one_line(
    bad: Case, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HOME", str(workplace / "home"))
    before = files(workplace)
    code = main(shlex.split(bad.line))
    error = capfd.readouterr().err
    assert code == bad.code, error
    assert error.startswith("error: "), error
    assert error.count("\n") == 1 or bad in DATA, error  # bad rows are listed, one a line
    assert "Traceback" not in error
    for text in bad.says:
        assert text in error
    written = files(workplace).items() - before.items()
    own = {workplace / "outputs", workplace / "home" / ".cache" / "qlora_trainer"}
    assert all(own & set(path.parents) for path, _ in written), "nothing is written outside output_dir"
    if bad not in DATA:  # those are found in the rows, when the run's folder is already its own
        cache = workplace / "home" / ".cache" / "qlora_trainer"  # of rows that were found to be good
        assert not [path for path, _ in written if cache not in path.parents]


def test_all_problems_are_reported_at_once(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    code = main(["recipe=unknown.yaml", "lr=1", "lora.r=x", "train.max_length=1", "lora.dtype=int4"])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert lines[0] == "error: 5 problems in the configuration:"
    assert [line.split(": ")[0] for line in lines[1:3]] == ["  - unknown.yaml:3", "  - lr"]
    assert sorted(line.split(": ")[0][4:] for line in lines[3:]) == [
        "lora.dtype",
        "lora.r",
        "train.max_length",
    ]


@pytest.mark.parametrize("bad", [NAMES[0], MISSING[0], FOLDERS[-1]], ids=lambda bad: bad.line[:40])
def test_a_real_process_ends_with_the_same_line_and_code(bad: Case, workplace: Path) -> None:
    command = [sys.executable, "-m", "qlora_trainer", *shlex.split(bad.line)]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=60)
    assert done.returncode == bad.code
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(text in done.stderr for text in bad.says)


def test_bad_input_is_found_before_torch_is_imported(workplace: Path) -> None:
    program = (
        "import sys; from qlora_trainer.__main__ import main\n"
        f"lines = {[shlex.split(bad.line) for bad in (*NAMES, *VALUES, *CONFLICTS, *MISSING, *RECIPES)]!r}\n"
        "codes = [main(line) for line in lines]\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "print(0 in codes, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=workplace, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False []\n", done.stdout + done.stderr
