"""stdout and stderr that are closed, full, left by their reader or not Unicode, and plots under any backend."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from command import HELPERS, SHORTEST, TINY, Command

from jem_jax.common import streams
from jem_jax.distributed.interrupts import Interrupts
from jem_jax.runs import checkpoint


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


def test_a_stream_that_is_closed_or_full_is_left(monkeypatch):
    closed = _text("utf-8")
    closed.close()
    with open("/dev/full", "w") as full:
        for stream in (closed, full):
            monkeypatch.setattr(sys, "stdout", stream)
            with streams.unfailing():
                print("lost", flush=True)
                print("lost", flush=True)


@pytest.mark.parametrize(
    ("argument", "redirection", "status"),
    [("--help", "| head -n 1", "0\n"), ("--help", "> /dev/full", "0\n"), ("--config=gone", "2> /dev/full", "2\n")],
)
def test_a_command_ends_as_it_would_without_its_output(tmp_path, argument, redirection, status):
    command = ["bash", "-c", f'( "$@"; echo $? >status ) {redirection}', "bash", sys.executable, "-m", "jem_jax.main"]
    ended = subprocess.run([*command, argument], cwd=tmp_path, check=False, stderr=subprocess.PIPE)
    assert ((tmp_path / "status").read_text(), ended.stderr) == (status, b"")


ALONE = """
import os, signal, sys
from jem_jax.main import main
from jem_jax.training import loop
log = loop._log
def hang_up(training, recorder):
    os.kill(os.getpid(), signal.SIGHUP)
    log(training, recorder)
loop._log = hang_up
assert main() == 0
open("pyplot", "w").write(str("matplotlib.pyplot" in sys.modules))
import jax, jax.numpy as jnp
from jem_jax.distributed import devices
slow = lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), x)
one, several = jax.jit(slow), devices.per_device(lambda x: devices.mean(slow(x)), in_axes=(None,), out_axes=None)
x = jnp.ones((200, 200))
for run in (one, several):
    jax.block_until_ready(run(x))
open("ready", "w").write(str([run(x + 1).is_ready() for run in (one, several)]))
"""


def test_a_run_outlives_its_terminal_under_nohup_and_plots_under_any_backend(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    subprocess.run(
        ["bash", "-c", 'trap "" HUP; exec "$@" >&- 2>&-', "bash", sys.executable, "-c", ALONE, *SHORTEST,
         "--workdir=run"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HELPERS), "MPLBACKEND": "nonsense"}, check=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "report" / "report.json").read_text())["jem"]
    assert (tmp_path / "run" / "report" / "confusion.png").stat().st_size > 1000
    assert (tmp_path / "pyplot").read_text() == "False"
    # Queued programs of several devices can block each other for good: a CPU has one program at a time.
    assert (tmp_path / "ready").read_text() == "[True, True]"
    # What libraries print went nowhere, and not into a file that has the number of a closed stream.
    assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "18") is None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_closed_terminal_and_batch_systems_ask_to_stop(number):
    # Whoever started the tests may have had hang-ups ignored.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(number)
            assert interrupts.requested(1, 1)
    finally:
        signal.signal(number, before)
    assert interrupts.signal == number


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
