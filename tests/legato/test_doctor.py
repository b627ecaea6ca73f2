"""`legato doctor --model FOLDER` says what a worker and the router would say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llama import SHAPES, make_llama

from legato.command.main import run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model", SHAPES[0])


def found(model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    run(["doctor", "--model", str(model), "--json"])
    (finding,) = [one for one in json.loads(capsys.readouterr().out) if one["name"] == "model"]
    return finding


def test_a_model_that_can_be_served(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = model / "tokenizer_config.json"
    plain = json.loads(settings.read_text())
    for template, said in ((None, ", no chat template"), ("{{ messages[0].content }}", ", chat template")):
        settings.write_text(json.dumps(plain | {"chat_template": template}))
        finding = found(model, capsys)
        assert finding["state"] == "ok"
        assert finding["found"].endswith(said)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "is no tokenizer"),
        ("tokenizer_config.json", "[", "is no JSON"),
        ("chat_template.jinja", "{% if %}", "chat template is no valid jinja2"),
        ("config.json", None, "config.json"),
    ],
)
def test_a_model_that_cannot(
    model: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None, said: str
) -> None:
    (model / file).unlink(missing_ok=True)
    if content is not None:
        (model / file).write_text(content)
    finding = found(model, capsys)
    assert finding["state"] == "missing"
    assert said in finding["advice"]
    assert run(["doctor", "--model", str(model)]) == 1
