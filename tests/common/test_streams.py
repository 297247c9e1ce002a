"""stdout and stderr that are closed, full, left by their reader or not Unicode, and plots under any backend."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from command import HELPERS, SHORTEST, TINY, Command, steps_logged

from jem_jax.common import streams
from jem_jax.distributed.interrupts import Interrupts
from jem_jax.report import figures
from jem_jax.runs import checkpoint

LONG = (*TINY, "--config.training.epochs=100", "--config.training.checkpoint_every=100")


def _text(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", b"\\u221e \\xe9"), ("latin-1", b"\\u221e \xe9"), ("utf-8", "∞ é".encode())]
)
def test_what_an_encoding_lacks_is_written_out(monkeypatch, encoding, written):
    monkeypatch.setattr(sys, "stdout", _text(encoding))
    stream = sys.stdout
    with streams.unfailing():
        print("∞ é", end="", flush=True)
        assert sys.stdout.encoding == encoding
    assert stream.buffer.getvalue() == written
    assert sys.stdout is stream


def _closed() -> io.TextIOWrapper:
    stream = _text("utf-8")
    stream.close()
    return stream


def _full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def _unread() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize("stream", [lambda: None, _closed, _full, _unread])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_fails_is_left(monkeypatch, stream, name):
    monkeypatch.setattr(sys, name, stream())
    with streams.unfailing():
        for _ in range(2):
            print("lost", file=getattr(sys, name), flush=True)
    if getattr(sys, name) is not None:
        getattr(sys, name).close()


def _run(redirection: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    """The command under a shell's redirection; its status comes first on stderr."""
    command = f'( "$@"; echo $? >status ) {redirection}'
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "jem_jax.main", *SHORTEST, "--workdir=run"],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(HELPERS), **environment}, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("redirection", ["| head -n 1", "> /dev/full", ">&- 2>&-", "2> /dev/full"])
def test_a_run_goes_on_without_its_output_and_loses_none_to_a_character_or_a_backend(tmp_path, redirection):
    ended = _run(redirection, tmp_path, PYTHONIOENCODING="ascii", MPLBACKEND="module://nowhere")
    assert (tmp_path / "status").read_text() == "0\n"
    assert ended.stderr == b""
    assert (b"report.html" in ended.stdout) == (redirection == "2> /dev/full")
    assert json.loads((tmp_path / "run" / "report" / "report.json").read_text())["jem"]
    assert (tmp_path / "run" / "report" / "confusion.png").exists()
    assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "18") is None


@pytest.mark.parametrize("backend", ["nonsense", "TkAgg"])
def test_plots_need_no_backend(tmp_path, backend):
    """One that lies nowhere is that of the runs above."""
    script = (
        "import sys, numpy as np; from pathlib import Path; from jem_jax.report import figures\n"
        "print(figures.confusion({'jem': np.eye(2, dtype=int)}, ['a', 'b'], Path(sys.argv[1])))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    ended = subprocess.run(
        [sys.executable, "-c", script, "a.png"], env={**os.environ, "MPLBACKEND": backend}, cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert ended.stderr == b""


def test_plots_leave_the_users_figures(tmp_path):
    from matplotlib import pyplot

    pyplot.close("all")
    pyplot.figure(77)
    figures.confusion({"jem": np.eye(2, dtype=int)}, ["a", "b"], tmp_path / "a.png")
    assert pyplot.get_fignums() == [77]
    pyplot.close(77)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_the_signals_of_batch_systems_ask_to_stop(number):
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        assert interrupts.requested(1, 1)
    assert interrupts.signal == number


def test_a_closed_terminal_stops_and_saves(tmp_path):
    # Whoever started the tests may have had hang-ups ignored, which a command inherits.
    command = Command(*LONG, cwd=tmp_path, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)")
    run = tmp_path / "runs" / "digits"
    command.wait_for(lambda: steps_logged(run) >= 3)
    command.send(signal.SIGHUP)
    status, output, _ = command.wait()
    assert status == 128 + signal.SIGHUP
    stopped = checkpoint.steps(run / "checkpoints")[-1]
    assert f"stopped at iteration {stopped} of 1800; saved in runs/digits" in output


def test_nohup_is_heeded(tmp_path):
    command = Command(*SHORTEST, cwd=tmp_path, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    command.wait_for(lambda: steps_logged(tmp_path / "runs" / "digits") >= 1)
    command.send(signal.SIGHUP)
    assert command.wait()[0] == 0


def test_ctrl_c_that_is_lost_in_a_library_ends_the_command(tmp_path):
    before = (
        "import time\nfrom jem_jax.commands import command_line, config_files\ncommand_line.end_at_ctrl_c()\n"
        "command_line._LAST_SECONDS = 0.5\n"
        "def read(*_):\n"
        "  try: open('begun', 'w').close(); time.sleep(60)\n"
        "  except KeyboardInterrupt: time.sleep(60)\n"
        "config_files.read = read"
    )
    command = Command(*TINY, cwd=tmp_path, before=before)
    command.wait_for((tmp_path / "begun").exists)
    command.send(signal.SIGINT)
    assert command.wait(20)[0] == 130


def test_ctrl_c_while_libraries_are_imported(tmp_path):
    (tmp_path / "slow.py").write_text("open('begun', 'w').close()\nimport time\ntime.sleep(60)\n")
    command = Command("--config=slow.py", cwd=tmp_path)
    command.wait_for((tmp_path / "begun").exists)
    command.send(signal.SIGINT)
    status, _, errors = command.wait(20)
    assert (status, errors) == (130, "jem-jax: stopped; the same command goes on\n")
