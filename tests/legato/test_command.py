"""The command: help, error lines and exit codes, and the client's subcommands against a real server."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest

import spec.errors
from legato import errors
from legato.command import terminal
from legato.command.main import app, run
from legato.command.waterfall import waterfall
from legato.types import Ledger

COMMANDS = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_explains_itself_with_examples(command, capsys):
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  legato {command}" in shown.split("Options:")[0]


def test_help_loads_no_grpc_and_no_torch():
    code = (
        "import sys; from legato.command.main import run; run(['--help']);"
        "assert not {'grpc', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exit codes" in done.stdout


def test_wrong_command_lines(capsys):
    for wrong in (["genrate"], ["generate"], ["generate", "x", "--max-tokens", "many"], ["up", "--prefill", "0"]):
        assert run(wrong) == 2, wrong
        assert "Traceback" not in capsys.readouterr().err
    assert run(["chat", "--say", ""]) == 2
    assert "--say" in capsys.readouterr().err


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"legato {importlib.metadata.version('legato')}\n"


@pytest.mark.parametrize("tree", [errors, spec.errors])
def test_every_error_is_one_line_with_fault_and_advice(tree):
    for one in vars(tree).values():
        if not (isinstance(one, type) and issubclass(one, tree.LegatoError)):
            continue
        error = one(
            "is\nwrong", **({"field": "x"} if tree is spec.errors and issubclass(one, tree.InvalidParameter) else {})
        )
        line = terminal.error_line(error)
        assert "\n" not in line
        assert line.startswith("legato: ")
        assert "; " in line.rsplit("(", 1)[1]
        assert error.reason in terminal._ADVICE or tree is spec.errors
        expected = {"RequestError": 2, "SetupError": 4, "ClusterError": 3, "HandoffError": 3}
        names = [base.__name__ for base in one.__mro__]
        code = next((expected[name] for name in names if name in expected), 1)
        assert terminal.exit_code_of(error) == (1 if error.reason == "INTERNAL" else code)


def test_generate_streams_and_draws(router, capsys, expected):
    assert run(["generate", "abc", "-a", router.address, "-n", "3", "--seed", "1", "--trace"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(chr(97 + token) for token in expected(1, 3)) + "\n"
    for stage in ("route", "queue", "prefill", "exposed transfer", "decode queue", "first decode step", "prefill-0"):
        assert stage in shown.err
    assert router.toy.requests[0].options.sampling.max_tokens == 3


def test_an_adapter_is_asked_for_by_name(router):
    assert run(["generate", "abc", "-a", router.address, "-n", "1", "--adapter", "poems"]) == 0
    assert run(["chat", "--say", "hi", "-a", router.address, "-n", "1", "--adapter", "prose"]) == 0
    assert run(["generate", "abc", "-a", router.address, "-n", "1"]) == 0
    assert [request.options.adapter for request in router.toy.requests] == ["poems", "prose", ""]


def test_generate_as_json_from_standard_input(router, capsys, monkeypatch, expected):
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert run(["generate", "-", "-a", router.address, "-n", "2", "--seed", "1", "--logprobs", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert router.toy.requests[0].text == "from stdin"
    assert answer["choices"][0]["token_ids"] == expected(1, 2)
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "proposed_tokens": 0,
        "accepted_tokens": 0,
    }
    assert answer["choices"][0]["ledger"]["prefill_s"] >= 0


def test_chat_keeps_its_history(router, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/new\nthree\n/quit\nfour\n"))
    assert run(["chat", "--system", "be brief", "-a", router.address, "--max-tokens", "2", "--seed", "1"]) == 0
    answer = capsys.readouterr().out.splitlines()[0]
    said = [[(m.role, m.content) for m in request.messages] for request in router.toy.requests]
    system = ("system", "be brief")
    assert said == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", answer), ("user", "two")],
        [system, ("user", "three")],
    ]
    assert run(["chat", "--say", "hi", "-a", router.address]) == 0
    assert [m.content for m in router.toy.requests[-1].messages] == ["hi"]


def test_models_and_top(router, capsys):
    assert run(["models", "-a", router.address]) == 0
    shown = capsys.readouterr().out
    assert "toy" in shown
    assert "poems@01234567" in shown
    assert run(["models", "-a", router.address, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["max_context_tokens"] == 99
    assert model["adapters"] == [{"name": "poems", "revision": "0123456789"}]
    assert run(["top", "-a", router.address, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "decode-0" in shown
    assert "25% of 8" in shown
    assert "p90   200.0 ms" in shown
    assert run(["top", "-a", router.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["router_id"] == "toy-router"


def test_errors_of_the_cluster_are_one_line(router, capsys, script):
    router.toy.scripts.append(
        script(fail_after_tokens=0, reason="CONTEXT_TOO_LONG", status=grpc.StatusCode.INVALID_ARGUMENT)
    )
    assert run(["generate", "abc", "-a", router.address]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    router.stop()
    assert run(["models", "-a", router.address, "--timeout", "0.5"]) == 3
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "legato up" in shown


def test_control_characters_do_not_reach_the_terminal():
    assert terminal.printable("a\x1b[31mb\x07\tc\né🙂") == "a[31mb\tc\né🙂"


def test_ctrl_c_ends_a_client_with_130(router, script):
    router.toy.scripts.append(script(hang_after_tokens=1))
    command = [sys.executable, "-m", "legato.command.main", "generate", "abc", "-a", router.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert router.toy.cancelled.wait(5)


def test_waterfall_bars_follow_each_other():
    table = waterfall(Ledger(0.1, 0.1, 0.2, 0.0, 0.2, 0.4, 0.41, 1.0, 0.0))
    bars = [str(cell) for cell in table.columns[2]._cells][:6]
    assert [len(bar) for bar in bars] == [4, 9, 18, 19, 26, 44]
    for before, bar in itertools.pairwise(bars):
        assert len(bar) - len(bar.lstrip()) == len(before.rstrip("▏"))


@pytest.fixture
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def up(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "legato.command.main", "up", *arguments]
    variables = os.environ | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables, check=False)


def test_up_refuses_what_cannot_work_before_anything_starts(taken_port, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = tmp_path / "cluster.yaml"
    config.write_text("prefil: 2\n")
    cases = [
        (["--port", str(taken_port)], {}, "choose another port"),
        (
            ["--port", "0", "--redis", f"redis://u:secret@127.0.0.1:{taken_port + 1}"],
            {},
            "no Redis answers at redis://127.0.0.1",
        ),
        (["--config", str(config)], {}, "prefill"),
        (["--port", "0"], {"LEGATO_ENGINE__BLOCK_TOKENS": "0"}, "LEGATO_ENGINE__BLOCK_TOKENS"),
        (["--model", str(tmp_path / "nowhere")], {}, "nowhere"),
        (["--port", "0", "--host", "192.0.2.1"], {}, "the host '192.0.2.1' is no address of this machine"),
        (["--run-folder", str(config)], {}, f"the run folder {config} cannot be used: File exists"),
        (["--run-folder", "/proc/x"], {}, "the run folder /proc/x cannot be used: No such file or directory"),
        (["--run-folder", str(config / "in")], {}, "cannot be used: Not a directory"),
    ]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for arguments, environment, said in cases:
        with_model = arguments if "--model" in arguments else [*arguments, "--model", str(model)]
        done = up(*with_model, environment={"LEGATO_ADDRESS": "localhost:1", "TMPDIR": str(scratch)} | environment)
        assert done.returncode == 4, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("legato: ")
        assert said in line
        assert "secret" not in done.stderr
        assert "starting" not in done.stderr
        assert "logs are in" not in done.stderr
        assert not list(scratch.iterdir())  # nothing was written, so nothing stays
        assert done.stdout == ""


def test_a_tether_ends_its_command_with_its_parent(tmp_path):
    inner = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    tether = [sys.executable, "-m", "legato.command.local.tether", sys.executable, "-c", inner, str(tmp_path / "pid")]
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, process_group=0)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, *tether])
    pid = int(_wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    process.kill()
    process.wait()
    assert _wait_for(lambda: not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return sys.platform != "linux"


def _wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come")
