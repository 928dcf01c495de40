"""`evaluate` and `chat` on a finished run, through the command line."""

import io
import json
import shutil

import pytest

from qlora_trainer.__main__ import main
from tests import tiny
from tests.export import runs

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]}
    for n in range(6)
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run = runs.make(folder)
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS))
    (run.adapter.parent / "config.yaml").write_text(
        f"model: {{model_name_or_path: {run.base}}}\n"
        f"data: {{path: {rows}, eval_path: {rows}, cache_dir: {folder / 'cache'}}}\n"
        "evaluate: {task: exact_match, max_new_tokens: 4, max_rows: 4, examples: 2}\n"
        "chat: {max_new_tokens: 6}\n"
    )
    return run


def test_evaluate_shows_and_stores_base_beside_tuned(finished, capsys):
    folder = finished.adapter.parent
    assert main(["evaluate", f"run={folder}"]) == 0
    (found,) = json.loads((folder / "evaluation.json").read_text()).values()  # one held-out source
    assert found["base"]["tokens"] == found["tuned"]["tokens"] > 0
    assert found["base"]["loss"] != found["tuned"]["loss"]
    assert found["tuned"]["questions"] == 4 and found["tuned"]["exact_match"] == 0
    printed = capsys.readouterr().out
    assert f"{found['tuned']['perplexity']:.2f}" in printed and "say 2" in printed
    assert (
        len(found["examples"]) == 2
        and found["examples"][0]["reference"] in (folder / "report.html").read_text()
    )


def test_a_quick_evaluation_does_not_replace_a_full_one(finished, capsys):
    folder = finished.adapter.parent
    (folder / "evaluation.json").write_text('{"torn": ')
    assert main(["evaluate", f"run={folder}"]) == 0
    assert (folder / "evaluation.json.bad").is_file()
    assert "evaluation.json: holds no results" in capsys.readouterr().err
    (full,) = json.loads((folder / "evaluation.json").read_text()).values()
    assert full["rows"] == full["questions"] == 4 and "latest" not in full
    assert main(["evaluate", f"run={folder}", "evaluate.max_rows=2"]) == 0
    assert "a fuller result" in capsys.readouterr().err
    (stored,) = json.loads((folder / "evaluation.json").read_text()).values()
    latest = stored.pop("latest")
    assert stored == full and latest["rows"] == latest["questions"] == 2
    page = (folder / "report.html").read_text()
    assert "held-out rows, 4 of them" in page and "held-out rows, the latest 2" in page
    assert main(["evaluate", f"run={folder}"]) == 0
    (stored,) = json.loads((folder / "evaluation.json").read_text()).values()
    assert "latest" not in stored and stored["rows"] == 4


def test_chat_answers_each_line_of_a_pipe(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nhello\n"))
    assert main(["chat", f"run={finished.adapter.parent}"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first


def test_a_base_that_was_moved_is_named_and_another_is_refused(finished, capsys, monkeypatch, tmp_path):
    folder, moved = finished.adapter.parent, tmp_path / "moved"
    other = tiny.save(tmp_path / "other", seed=5, intermediate_size=128)
    chat, evaluate = ["chat", f"run={folder}"], ["evaluate", f"run={folder}"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(chat) == 0
    answer = capsys.readouterr().out
    shutil.move(finished.base, moved)
    try:
        for command in (chat, evaluate):
            assert main(command) == 66
            said = capsys.readouterr().err.strip()
            assert said.count("\n") == 0 and "model.model_name_or_path" in said and str(finished.base) in said
            assert main([*command, f"model.model_name_or_path={other}"]) == 74
            assert "fingerprint" in capsys.readouterr().err
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert main([*chat, f"model.model_name_or_path={moved}"]) == 0
        assert capsys.readouterr().out == answer
        assert main([*evaluate, f"model.model_name_or_path={moved}"]) == 0
    finally:
        shutil.move(moved, finished.base)


def test_chat_takes_bytes_that_are_no_text_in_the_terminals_encoding(finished, capsys, monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="ascii")
    monkeypatch.setattr("sys.stdin", given)
    assert main(["chat", f"run={finished.adapter.parent}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_run_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    assert main(["chat", f"run={tmp_path / 'none'}"]) == 66
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
