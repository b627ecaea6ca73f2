"""`legato bench` against a real gRPC server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from legato.command.main import run

TOKENIZER_CALLS = 10 + 40  # digits and texts, when lengths are asked for


def bench(router, *options):
    return run(["bench", "-a", router.address, *options])


def generated(router):
    return [request for request in router.toy.requests if hasattr(request, "options")]


def test_closed_loop_table(router, capsys):
    assert bench(router, "-c", "3", "-n", "9", "--warmup", "2", "--output-tokens", "5", "--slo-ttft-ms", "60000") == 0
    shown = capsys.readouterr().out
    for expected in ("closed loop, 3 in flight; toy, seed 0", "2 warm-up requests left out", "9 sent, 9 finished"):
        assert expected in shown
    for row in ("TTFT", "ITL", "TPOT", "end to end", "longest gap", "goodput", "100.0% kept TTFT", "prefill"):
        assert row in shown
    requests = generated(router)
    assert len(requests) == 11
    assert {request.options.sampling.max_tokens for request in requests} == {5}
    assert not any(request.options.sampling.ignore_eos for request in requests)
    assert len({request.text for request in requests}) == 11, "no prompt is sent twice"


def test_open_loop_json(router, capsys):
    options = ["--rate", "200", "-n", "40", "--prompt-tokens", "20-60", "--output-tokens", "2-6", "--seed", "3"]
    assert bench(router, *options, "--ignore-eos", "--warmup", "0", "--slo-tpot-ms", "60000", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    sampled = [(len(one.token_ids.ids), one.options.sampling.max_tokens) for one in generated(router)]
    assert all(20 <= prompt <= 60 and 2 <= output <= 6 for prompt, output in sampled)
    assert found["schema"] == "legato.bench/1"
    assert found["load"] == "open"
    assert found["seed"] == found["arguments"]["seed"] == 3
    assert found["arguments"]["prompt_tokens"] == "20-60"
    assert found["requests"] == {
        "sent": 40, "finished": 40, "failed": 0, "unfinished": 0, "warmup_excluded": 0, "failures": {},
    }  # fmt: skip
    assert found["tokens"]["prompt"] == sum(prompt for prompt, _ in sampled)
    assert found["tokens"]["output"] == sum(output for _, output in sampled)
    assert found["latency_ms"]["itl"]["count"] == sum(output - 1 for _, output in sampled)
    assert found["latency_ms"]["ttft"]["count"] == len(found["per_request"]) == 40
    assert found["slo"]["met"] == 40 and found["slo"]["attainment"] == 1.0
    assert found["slo"]["goodput_requests_per_s"] == pytest.approx(found["requests_per_s"]["finished"])
    assert set(found["ledger_ms"]) == {
        "route", "queue", "prefill", "exposed transfer", "decode queue", "first decode step",
    }  # fmt: skip
    dues = [row["due_s"] for row in found["per_request"]]
    assert dues == sorted(dues)
    assert found["load_generator"]["schedule_lag_ms"]["count"] == 40
    assert set(found["versions"]) == {"legato", "grpcio", "python"}
    described = (Path(__file__).resolve().parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    inner = [
        name for name, value in found.items() if isinstance(value, dict) and name not in ("arguments", "ledger_ms")
    ]
    names = [*found, *(key for name in inner for key in found[name]), *found["per_request"][0]]
    assert [name for name in names if f"`{name}`" not in described] == [], "what --json holds is documented"


def test_failures_are_counted_by_reason_and_miss_the_slo(router, script, capsys):
    full = {"status": grpc.StatusCode.RESOURCE_EXHAUSTED, "reason": "OVERLOADED"}
    lost = {"status": grpc.StatusCode.UNAVAILABLE, "reason": "WORKER_LOST"}
    router.toy.scripts = [script(fail_after_tokens=0, **full), script(), script(fail_after_tokens=3, **lost)]
    options = ["-c", "1", "-n", "6", "--warmup", "0", "--output-tokens", "4", "--slo-e2e-ms", "60000", "--json"]
    assert bench(router, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"]["failures"] == {"OVERLOADED": 1, "WORKER_LOST": 1}
    assert len(generated(router)) == 6, "what failed is not sent again unseen"
    assert found["slo"]["met"] == 4
    assert found["slo"]["attainment"] == pytest.approx(4 / 6)
    assert found["tokens"]["output"] == 16
    assert [row["failure"] for row in found["per_request"]].count(None) == 4
    assert any("2 requests (33.3%) failed" in warning for warning in found["warnings"])


def test_a_cluster_that_answers_nothing(router, script, capsys):
    router.toy.scripts = [script(fail_after_tokens=0, reason="NO_WORKERS") for _ in range(4)]
    assert bench(router, "-n", "4", "--warmup", "4") == 3
    assert "no request of the warm-up was answered: scripted NO_WORKERS" in capsys.readouterr().err
    router.toy.scripts = [script(fail_after_tokens=0, reason="NO_WORKERS") for _ in range(4)]
    assert bench(router, "-n", "4", "--warmup", "0") == 3
    shown = capsys.readouterr()
    assert "4 failed (4 NO_WORKERS)" in shown.out
    assert "scripted NO_WORKERS" in shown.err


def test_a_trace_is_played_with_its_lengths(router, tmp_path, capsys):
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 40, "hash_ids": [0, 1]},
        {"timestamp": 100, "input_length": 700, "output_length": 60, "hash_ids": [0, 2]},
        {"timestamp": 9000, "input_length": 10, "output_length": 1, "hash_ids": [3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert bench(router, "--trace", str(path)) == 2
    assert "2 of 3 requests" in capsys.readouterr().err
    options = ["--trace", str(path), "--max-requests", "2", "--scale-lengths", "0.1", "--speed", "2", "--warmup", "1"]
    assert bench(router, *options) == 0
    assert "open loop, trace.jsonl at 2 times its speed" in capsys.readouterr().out
    warmup, *requests = generated(router)
    assert [len(one.token_ids.ids) for one in requests] == [60, 70]
    assert [one.options.sampling.max_tokens for one in requests] == [4, 6]
    assert all(one.options.sampling.ignore_eos for one in requests)
    block_tokens = 52  # of 512, a tenth, rounded up
    first, second = (list(one.token_ids.ids) for one in requests)
    assert first[:block_tokens] == second[:block_tokens]
    assert first[block_tokens:] != second[block_tokens:60]
    assert list(warmup.token_ids.ids)[:8] != first[:8]
    assert bench(router, *options) == 0
    assert list(generated(router)[-2].token_ids.ids)[:9] != first[:9], "the second run begins its prompts otherwise"
    for _ in range(2):
        assert bench(router, *options, "--nonce", "7") == 0
    *_, before, _, _, after, _ = (list(one.token_ids.ids) for one in generated(router))
    assert before == after


def test_plot(router, script, tmp_path, capsys):
    router.toy.scripts = [script()] * 3 + [script(fail_after_tokens=0, reason="OVERLOADED")]
    path = tmp_path / "run.png"
    options = ["--rate", "100", "-n", "12", "--warmup", "0", "--output-tokens", "3", "--slo-ttft-ms", "100"]
    assert bench(router, *options, "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    router.toy.scripts = [script(fail_after_tokens=0, reason="OVERLOADED")] * 2
    assert bench(router, "-n", "2", "--warmup", "0", "--plot", str(path)) == 3, "nothing to draw is drawn as nothing"
    capsys.readouterr()
    for wrong in ("run.txt", "missing/run.png"):
        before = len(router.toy.requests)
        assert bench(router, "--plot", str(tmp_path / wrong)) == 2
        assert "--plot" in capsys.readouterr().err
        assert len(router.toy.requests) == before, "found out before the load, not after"


def test_the_api_key_is_sent_and_not_shown(router, capsys):
    assert bench(router, "-n", "1", "--warmup", "0", "--api-key", "s3cret-key", "--json") == 0
    assert "s3cret-key" not in capsys.readouterr().out
    assert router.toy.metadata[-1]["authorization"] == "Bearer s3cret-key"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "1", "--concurrency", "2"], "--concurrency cannot go with --rate"),
        (["--rate", "1", "--trace", "x"], "--trace cannot go with --rate"),
        (["--rate", "0"], "--rate must be a number above 0"),
        (["--rate", "nan"], "--rate must be a number above 0"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--warmup", "-1"], "--warmup must not be negative"),
        (["--nonce", "-1"], "--nonce must not be negative"),
        (["--duration", "inf"], "--duration must be"),
        (["--speed", "2"], "--speed is for a --trace"),
        (["--scale-lengths", "fit"], "--scale-lengths is for a --trace"),
        (["--trace", "x", "--scale-lengths", "much"], "--scale-lengths must be a number or fit"),
        (["--trace", "x", "--prompt-tokens", "5"], "--prompt-tokens cannot go with --trace"),
        (["--trace", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--prompts", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--prompt-tokens", "few"], "--prompt-tokens must be N, LOW-HIGH"),
        (["--slo-ttft-ms", "-1"], "--slo-ttft-ms must be a number above 0"),
        (["--model", "other"], "'other' is not served; the cluster serves toy"),
        (["--timeout-s", "0"], "timeout_s must be a finite number of seconds above 0"),
    ],
)
def test_wrong_options_are_named(options, says, router, capsys):
    assert bench(router, *options) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert not generated(router)


def test_no_cluster(capsys):
    assert run(["bench", "-a", "127.0.0.1:1"]) == 3
    assert "start a cluster with `legato up`" in capsys.readouterr().err


def test_the_client_alone_is_enough_and_a_plot_says_what_it_lacks(router):
    missing = (
        "numpy",
        "torch",
        "matplotlib",
        "tokenizers",
        "redis",
        "spec",
        "service",
        "scheduler",
        "engine",
        "kernels",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}));"
        "from legato.command.main import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "bench", "-a", router.address, "-n", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 finished" in done.stdout
    before = len(router.toy.requests)
    done = subprocess.run([*command, "--plot", "run.png"], capture_output=True, text=True)
    assert done.returncode == 4
    assert "matplotlib" in done.stderr and "pip install -e '.[serve]'" in done.stderr
    assert len(router.toy.requests) == before, "said before the load, not after"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_shows_what_was_measured(as_json, router, script):
    router.toy.scripts = [script() for _ in range(5)] + [script(hang_after_tokens=2) for _ in range(9)]
    command = [sys.executable, "-m", "legato.command.main", "bench", "-a", router.address, "-c", "2", "-n", "50"]
    command += ["--warmup", "0", "--output-tokens", "3", *(["--json"] if as_json else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while len(generated(router)) < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said
    if as_json:
        found = json.loads(shown)
        assert found["interrupted"] is True
        assert found["requests"]["finished"] == 5
        assert found["requests"]["unfinished"] == 2
    else:
        assert "stopped after" in shown
        assert "5 finished, 0 failed, 2 unfinished" in shown
    assert router.toy.cancelled.wait(5), "what was in flight was cancelled"


def test_ctrl_c_before_anything_was_measured(router, script):
    router.toy.scripts = [script(hang_after_tokens=0) for _ in range(4)]
    command = [sys.executable, "-m", "legato.command.main", "bench", "-a", router.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not generated(router) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert shown == ""
    assert "stopped while warming up: nothing was measured" in said
