"""The whole of bench.peers on a tiny model, with the sides that need no environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import write_gguf
from tiny_llama import Shape, load_reference, make_llama

from bench import peers

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_leaves_a_table_and_a_line(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", load_reference(make_llama(tmp_path / "llama", Shape("tiny"))))
    results = tmp_path / "results" / "peers.jsonl"
    command = [sys.executable, "-m", "bench.peers", "--model", model, "--rounds", "2", "--threads", "1", "--batch", "1"]
    command += ["3", "--context-tokens", "7", "--decode-steps", "5", "--prefill-tokens", "43", "--results", results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vLLM was left out: --vllm-python was not given" in done.stdout
    assert "llama.cpp was left out: --llama-cpp-python was not given" in done.stdout
    (line,) = results.read_text().splitlines()
    found = json.loads(line)
    assert found["bench"] == "peers"
    assert list(found["sides"]) == ["ours", "transformers"]
    assert list(found["results"]) == ["decode, batch 1", "decode, batch 3", "prefill, 43 tokens"]
    for row in found["results"].values():
        assert all(len(side["all_s"]) == 2 and min(side["all_s"]) > 0.0 for side in row["sides"].values())
    same, prompts = found["first_token_agreement"]["transformers"]
    assert prompts == 2 * (1 + 3 + 1)
    assert same >= 8, "two of ten may part by the rounding of bfloat16"


def test_an_interpreter_may_be_given_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.peers", "--vllm-python", "bin/python"])
    python = peers.parse_arguments().vllm_python
    assert python == tmp_path / "bin" / "python"
    environment = peers.vllm_environment(python, 1)
    assert str(tmp_path / "lib" / "libiomp5.so") in environment["LD_PRELOAD"].split(":")
    assert len(environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1
