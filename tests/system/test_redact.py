from __future__ import annotations

import sys

import pytest

from qlora_trainer.errors import ConfigError
from qlora_trainer.system.redact import MASK, Redactor, is_secret_name, masked_output, require_whole

CANARY = "canary-7f3e9a1c5d"


SECRET_NAMES = """HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY OPENAI_API_KEY DB_PASSWORD MY_SECRET
    GITHUB_TOKEN MYSQL_PASSWD COMET_API_KEY apiKey auth.token
    SSH_PASSPHRASE GOOGLE_CREDENTIALS S3_ACCESS_KEY DB_PASS REDIS_PWD SMTP_PW PGPASSWORD NPM_AUTH
    AZURE_CONNECTION_STRING SENTRY_DSN STORAGE_ACCOUNT_KEY HF_TOKEN_2 GCP_CREDENTIALS_JSON GITHUB_PAT
    connectionString SERVICE_URL_SIGNATURE"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_values_of_secret_variables_are_masked_wherever_they_appear(name: str) -> None:
    redact = Redactor({name: CANARY, "HOME": "/root/home"})
    assert redact.text(f"failed: GET https://x/{CANARY}?a=1 from /root/home") == (
        f"failed: GET https://x/{MASK}?a=1 from /root/home"
    )


@pytest.mark.parametrize(
    "name", ["pad_token", "eos_token", "max_new_tokens", "n_tokens", "tokens_per_second", "PATH", "OLDPWD"]
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
        "sk-" + "aB3x" * 12,
        "sk-ant-api03-" + "x9_Y-" * 12,
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
        ("redis://:pw@host:6379/0 and amqp://u:p@ss@h", f"redis://{MASK}@host:6379/0 and amqp://{MASK}@h"),
        ("ssh://git@host/x", f"ssh://{MASK}@host/x"),
        ("GET /x?sig=abc%2F&se=1", f"GET /x?sig={MASK}&se=1"),
        ("Server=db;User Id=u;Password=abc;", f"Server=db;User Id=u;Password={MASK};"),
        ("login(token='abc', retries=3)", f"login(token={MASK}, retries=3)"),
        ("my.password=abc: no such key", f"my.password={MASK}: no such key"),
        ("GET /x?token=abc&y=1", f"GET /x?token={MASK}&y=1"),
        ("Authorization: Bearer abcdefgh1234", f"Authorization: Bearer {MASK}"),
    ],
)
def test_secrets_in_addresses_are_masked_and_the_rest_stays(text: str, expected: str) -> None:
    assert Redactor({}).text(text) == expected


def test_ordinary_text_is_untouched() -> None:
    for text in (
        "step 200 loss 1.234 model meta-llama/Llama-2-7b sha256 " + "0a1b" * 16 + " git@host:team/repo.git",
        "/data/multitask-instruction-tuning-v2 /models/hf_internal_testing/sk-learn-pipelines-of-every-kind",
        "https://host:8080/a/@user mailto:someone@example.com C:/Users/me@corp/x ratio 3://4",
        "pad_token=<pad> max_new_tokens=5 sort_key=length; key=value, write lora.r=8",
    ):
        assert Redactor({"TOKEN": "short", "SORT_KEY": "instruction"}).text(text) == text
    assert Redactor({"SORT_KEY": "instruction"}).text("instruction") == "instruction"
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


def test_credentials_within_a_variable_are_masked_and_the_rest_of_it_is_not() -> None:
    redact = Redactor(
        {
            "DATABASE_URL": f"postgres://anna:{CANARY}%21@db.example.com/x?sslmode=require",
            "https_proxy": "http://robot:another-canary-1@proxy:3128",
            "JOBS": "Endpoint=sb://x;SharedAccessKey=third-canary-22;",
            "PLAIN_URL": "https://example.com/models",
            "SSH_PRIVATE_KEY": "-----BEGIN KEY-----\nfirst-line-of-a-key\nsecond-line-of-a-key\n",
        }
    )
    said = f"db.example.com {CANARY}%21 {CANARY}! another-canary-1 third-canary-22 https://example.com/models"
    hidden = f"db.example.com {MASK} {MASK} {MASK} {MASK} https://example.com/models"
    assert redact.text(said) == hidden
    assert redact.text("read second-line-of-a-key") == f"read {MASK}"


def test_a_masked_path_is_asked_for_again() -> None:
    assert require_whole("/a/b", "data.path") == "/a/b"
    with pytest.raises(ConfigError, match=r"data\.path: /a/\*\*\*/b held a secret.*data\.path=PATH"):
        require_whole(f"/a/{MASK}/b", "data.path")


@pytest.mark.parametrize(
    "piece", ["eyJ", "-eyJ", "sk-", "a=", "://a", "token=", "x.", "hf_", "-----BEGIN ", "@", '"a', "-"]
)
def test_hostile_text_is_masked_in_time_that_grows_with_its_length(piece: str) -> None:
    """A backtracking pattern would need hours for these, and every line of a log goes through here."""
    text = piece * 300_000
    assert len(Redactor({}).text(text)) <= 2 * len(text)
