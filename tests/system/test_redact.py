from __future__ import annotations

import sys

import pytest

from qlora_trainer.system.redact import MASK, Redactor, is_secret_name, masked_output

CANARY = "canary-7f3e9a1c5d"


SECRET_NAMES = """HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY OPENAI_API_KEY DB_PASSWORD MY_SECRET
    GITHUB_TOKEN MYSQL_PASSWD COMET_API_KEY apiKey auth.token
    SSH_PASSPHRASE GOOGLE_CREDENTIALS S3_ACCESS_KEY"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_values_of_secret_variables_are_masked_wherever_they_appear(name: str) -> None:
    redact = Redactor({name: CANARY, "HOME": "/root/home"})
    assert redact.text(f"failed: GET https://x/{CANARY}?a=1 from /root/home") == (
        f"failed: GET https://x/{MASK}?a=1 from /root/home"
    )


@pytest.mark.parametrize(
    "name", ["pad_token", "eos_token", "max_new_tokens", "n_tokens", "tokens_per_second", "PATH"]
)
def test_names_of_ordinary_values_are_left_alone(name: str) -> None:
    assert not is_secret_name(name)
    assert Redactor({name: CANARY}).tree({name: CANARY}) == {name: CANARY}


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 11,
        "sk-proj-" + "x9" * 20,
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "a1B2" * 9,
        "AKIA" + "ABCD1234" * 2,
        "xoxb-123456789012-abcdef",
        "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK",
    ],
)
def test_tokens_are_known_by_their_shape(secret: str) -> None:
    redact = Redactor({})
    assert redact.text(f"cannot open {secret}, try again") == f"cannot open {MASK}, try again"
    assert secret not in str(redact.tree({"data": {"path": [f"hub:{secret}"]}, secret: 1}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://anna:s3cret@host/x", f"https://{MASK}@host/x"),
        ("no file https:/anna:s3cret@host/x", f"no file https:/{MASK}@host/x"),
        ("https://0123456789abcdef0123@host/x", f"https://{MASK}@host/x"),
        ("GET /x?token=abc&y=1", f"GET /x?token={MASK}&y=1"),
        ("Authorization: Bearer abcdefgh1234", f"Authorization: Bearer {MASK}"),
    ],
)
def test_secrets_in_addresses_are_masked_and_the_rest_stays(text: str, expected: str) -> None:
    assert Redactor({}).text(text) == expected


def test_ordinary_text_is_untouched() -> None:
    text = "step 200 loss 1.234 model meta-llama/Llama-2-7b sha256 " + "0a1b" * 16 + " git@host:team/repo.git"
    assert Redactor({"TOKEN": "short"}).text(text) == text
    tree = {"a": [1, 2.5, None, True, "x"], "b": {"pad_token": "<pad>"}}
    assert Redactor({}).tree(tree) == tree


def test_values_under_secret_keys_are_masked() -> None:
    tree = {"hub": {"token": CANARY, "retries": 3}, "list": [{"password": CANARY}], "token": None}
    assert Redactor({}).tree(tree) == {
        "hub": {"token": MASK, "retries": 3},
        "list": [{"password": MASK}],
        "token": None,
    }


def test_a_path_under_a_secret_name_is_no_secret(tmp_path: object) -> None:
    assert Redactor({"GOOGLE_CREDENTIALS": str(tmp_path)}).text(f"in {tmp_path}") == f"in {tmp_path}"


def test_everything_printed_is_masked_and_the_streams_come_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    before = sys.stdout, sys.stderr
    with masked_output():
        print("out", CANARY)
        print("err", CANARY, file=sys.stderr)
        sys.stderr.writelines([CANARY, "\n"])
        assert sys.stdout.encoding and not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == before
    printed = capsys.readouterr()
    assert printed.out == f"out {MASK}\n" and printed.err == f"err {MASK}\n{MASK}\n"
