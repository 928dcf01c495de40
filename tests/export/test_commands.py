"""`export` and `verify` through the command line; the hub as a real client and a small fake server."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qlora_trainer.__main__ import main
from tests import tiny
from tests.export import runs

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(6)
]


@pytest.fixture
def finished(tmp_path):
    run = runs.make(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    (run.adapter.parent / "config.yaml").write_text(
        f"model: {{model_name_or_path: {run.base}}}\n"
        f"data: {{path: {rows}, eval_path: {rows}, cache_dir: {tmp_path / 'cache'}}}\n"
        "train: {max_length: 128}\n"
        "evaluate: {task: exact_match, max_new_tokens: 4}\n"
    )
    return run


def test_an_export_over_its_bound_ends_with_exit_3_and_its_card_says_so(finished, capsys):
    folder = finished.adapter.parent
    arguments = ["export.format=[merged]", "export.max_kl=1e-12", "export.verify_questions=1"]
    assert main(["export", f"run={folder}", *arguments]) == 3
    said = capsys.readouterr()
    assert "trained model" in said.out and "base alone" in said.out and "✗ merged" in said.out
    assert "merged diverges by" in said.err
    card = (folder / "exports" / "merged" / "README.md").read_text()
    assert "**merged failed:** diverges by" in card
    stored = json.loads((folder / "exports" / "verify.json").read_text())
    assert ">failed<" in (folder / "report.html").read_text()
    assert [model["model"] for model in stored["models"]] == ["trained model", "base alone", "merged"]
    assert stored["models"][2]["prompt_ids"] == stored["models"][0]["prompt_ids"]


def test_an_adapter_from_elsewhere_is_exported_where_it_is_told(finished, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((finished.adapter / name).read_bytes())
    target = tmp_path / "out"
    line = ["export", f"export.adapter={foreign}", "export.format=[merged]", "export.verify=false"]
    assert main([*line, f"output_dir={target}"]) == 0
    recipe = json.loads((target / "exports" / "merged" / "export.json").read_text())
    assert recipe["held"] == "none" and (target / "exports" / "merged" / "tokenizer.json").is_file()
    assert main(line) == 2
    assert "output_dir=FOLDER" in capsys.readouterr().err


def test_a_base_that_was_moved_is_named_and_another_is_refused(finished, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.move(finished.base, moved)
    other = tiny.save(tmp_path / "other", seed=5, intermediate_size=128)
    run = f"run={finished.adapter.parent}"
    export, verify = ["export", run, "export.format=[merged]", "export.verify=false"], ["verify", run]
    assert main(export) == 66
    assert "model.model_name_or_path" in capsys.readouterr().err
    assert main([*export, f"model.model_name_or_path={moved}"]) == 0
    for command in (export, verify):
        capsys.readouterr()
        assert main([*command, f"model.model_name_or_path={other}"]) == 74
        assert "fingerprint" in capsys.readouterr().err


def test_nothing_exported_and_too_little_to_calibrate_on_are_said(finished, capsys):
    folder = finished.adapter.parent
    assert main(["verify", f"run={folder}"]) == 2
    assert "nothing has been exported" in capsys.readouterr().err
    pytest.importorskip("gptqmodel")
    assert main(["export", f"run={folder}", "export.format=[gptq]", "export.group_size=64"]) == 65
    assert "export.calibration_samples=128" in capsys.readouterr().err
    assert not (folder / "exports" / "gptq").exists()


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's API as creating a repository and one commit of small files takes."""

    received: dict
    address: str
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.status != 200:
            self._answer({"error": "no"}, self.status)
        elif self.path == "/api/repos/create":
            self.received["repo"] = json.loads(body)
            self.received["token"] = self.headers.get("Authorization")
            self._answer({"url": f"{self.address}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.received["files"][entry["value"]["path"]] = content
            self._answer(
                {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1", "hookOutput": ""}
            )
        else:
            self._answer({})

    def do_GET(self):
        self._answer({"id": "me/model", "sha": "0", "siblings": [], "tags": []})

    def _answer(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Handler", (FakeHub,), {"received": {"files": {}}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    handler.address = address
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_nobody")
    yield handler
    server.shutdown()
    server.server_close()


def test_pushing_uploads_every_file_and_the_token_stays_in_the_header(finished, hub, capsys):
    folder = finished.adapter.parent
    line = ["export", f"run={folder}", "format=merged", "verify=false"]
    assert main([*line, "export.push_to_hub=me/model"]) == 0
    local = {path.name: path.read_bytes() for path in (folder / "exports" / "merged").iterdir()}
    assert hub.received["files"] == local
    repo = hub.received["repo"]
    assert repo.get("private") or repo.get("visibility") == "private"
    assert hub.received["token"] == "Bearer hf_a_token_of_nobody"
    assert not any(b"hf_a_token" in content for content in local.values())
    hub.status = 403
    assert main([*line, "export.push_to_hub=me/model"]) == 2
    assert "refuses this token (403)" in capsys.readouterr().err


def test_a_hub_that_is_not_there_costs_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    folder = finished.adapter.parent
    line = ["export", f"run={folder}", "export.format=[merged]", "export.verify=false"]
    assert main([*line, "export.push_to_hub=nobody"]) == 2
    assert main([*line, "export.push_to_hub=me/model"]) == 74
    assert "cannot be reached" in capsys.readouterr().err
    assert (folder / "exports" / "merged" / "model.safetensors").is_file()


def test_a_plain_model_without_adapter_is_converted_too(finished, tmp_path):
    """The walk-through: a base by itself, in another format."""
    line = ["export", f"model.model_name_or_path={finished.base}", f"output_dir={tmp_path / 'out'}"]
    assert main([*line, "export.format=[nf4]", "export.verify=false"]) == 0
    folder = tmp_path / "out" / "exports" / "nf4"
    assert json.loads((folder / "export.json").read_text())["adapter_sha256"] is None
    assert "without adapter" in (folder / "README.md").read_text()
    assert main([*line, "export.format=[adapter]", "export.verify=false"]) == 2
