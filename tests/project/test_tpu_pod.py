"""docs/launch/tpu_pod.sh runs with `gcloud` stubbed: hosts are processes on this machine, each with its own devices."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from command import HELPERS, SHORTEST, metrics, restored, steps_logged

from jem_jax.main import main
from jem_jax.runs import checkpoint

ROOT = Path(__file__).parents[2]
NAME, SLOTS, BATCH, STEPS = "slice", 65_536, 64, 36
RUN = (
    *SHORTEST, f"--config.sampler.buffer_size={SLOTS}", "--config.training.epochs=2", "--config.data.place=host",
    f"--config.training.batch_size={BATCH}",
)  # fmt: skip
WATCHED = """
import json, os, sys
import jem_jax
from jem_jax.distributed import devices
from jem_jax.main import main
from jem_jax.runs import checkpoint

def note(what, value):
    with open(os.path.join(os.environ["HOME"], "notes.jsonl"), "a") as file:
        file.write(json.dumps({what: value}) + "\\n")

def bytes_read():
    return int(open("/proc/self/io").read().split()[1])

def restore(*args, _restore=checkpoint.restore, **settings):
    before = bytes_read()
    found = _restore(*args, **settings)
    note("restored", bytes_read() - before)
    return found

def shard_rows(array, rows, _shard_rows=devices.shard_rows):
    found = _shard_rows(array, rows)
    note("rows", found.shape[0] * found.shape[1])
    return found

checkpoint.restore, devices.shard_rows = restore, shard_rows
note("code", jem_jax.__file__)
note("process", os.getpid())
sys.exit(main())
"""
"""The command, which writes down what it reads"""


@pytest.fixture
def pod(tmp_path):
    """A function of a number of hosts that starts the recipe on them."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    watched = tmp_path / "watched.py"
    watched.write_text(WATCHED)
    command = f'#!/bin/sh\nexport PYTHONPATH=$HOME/jem_jax:{HELPERS}\nexec {sys.executable} {watched} "$@"\n'
    # A virtual environment whose pip installs nothing, and whose jem-jax is the code that was sent to the host.
    make = f"""#!/bin/sh
[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cd "$3/bin" || exit 1
printf '#!/bin/sh\\necho "$@" > "$HOME/installed"\\n' > pip
cp {bin_dir}/jem-jax jem-jax && chmod +x pip
"""
    for name, text in (
        ("gcloud", f'#!/bin/sh\nexec {sys.executable} {HELPERS / "programs" / "gcloud.py"} "$@"\n'),
        ("sudo", "#!/bin/sh\nexit 0\n"),
        ("python3.11", make),
        ("jem-jax", command),
    ):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    started = []

    def start(hosts):
        pod = {"POD": str(tmp_path), "POD_HOSTS": str(hosts), "POD_JOB": str(os.getpid() + len(started))}
        environment = {
            **os.environ, **pod, "PATH": f"{bin_dir}:{os.environ['PATH']}", "TPU_NAME": NAME, "ZONE": "here",
            "SHARED": str(tmp_path), "JAX_NUM_CPU_DEVICES": "2",
        }  # fmt: skip
        recipe = [ROOT / "docs" / "launch" / "tpu_pod.sh", *RUN]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(recipe, cwd=ROOT, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def _notes(home, what):
    lines = [json.loads(line) for line in (home / "notes.jsonl").read_text().splitlines()]
    return [line[what] for line in lines if what in line]


@pytest.fixture
def undisturbed(tmp_path):
    """The same run in this process, on its four devices, with its images on them rather than streamed."""
    run = tmp_path / "undisturbed"
    assert main([*RUN, "--config.data.place=device", f"--workdir={run}"]) == 0
    return run


def _preempted(recipe, home, process):
    """What a recipe says whose host's process, so many of its processes before it, is told to stop."""
    os.kill(_notes(home, "process")[process], signal.SIGTERM)
    said, _ = recipe.communicate(timeout=120)
    assert recipe.returncode == 143
    return int(re.search(rf"stopped at iteration (\d+) of {STEPS}; saved", said)[1]), said


def _wait(recipe, happened):
    deadline = time.monotonic() + 240
    while not happened():
        assert recipe.poll() is None, recipe.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not (Path("/proc/self/io").exists() and shutil.which("git")), reason="needs Linux and git")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the recipe sends what git has")
def test_a_pod_stops_at_preemptions_and_goes_on_with_fewer_hosts_and_with_more(pod, tmp_path, undisturbed):
    run, homes = tmp_path / "runs" / NAME, [tmp_path / f"host{number}" for number in (0, 1)]
    two = pod(2)
    _wait(two, lambda: steps_logged(run) >= 4)
    for home in homes:
        assert (home / "installed").read_text() == f"install --quiet -e {home}/jem_jax[tpu]\n"
        assert _notes(home, "code") == [f"{home}/jem_jax/jem_jax/__init__.py"]
    # Told to one of them, both stop.
    stopped, said = _preempted(two, homes[1], 0)
    assert "JEM: 4 CPU devices in 2 processes" in said
    assert checkpoint.damage(run / "checkpoints" / str(stopped)) is None
    for home in homes:
        assert set(_notes(home, "rows")) == {BATCH // 2}

    one = pod(1)
    _wait(one, lambda: steps_logged(run) >= stopped + 4)
    again, said = _preempted(one, homes[0], 1)
    assert f"JEM: going on from iteration {stopped} of {STEPS}" in said
    assert "JEM: 2 CPU devices" in said

    two = pod(2)
    said, _ = two.communicate(timeout=240)
    assert two.returncode == 0, said
    assert f"JEM: going on from iteration {again} of {STEPS}" in said
    # Each reads the half of the buffer that its devices need; the one host read all of it.
    buffer_bytes = SLOTS * 64 * 4
    first, second = (_notes(home, "restored") for home in homes)
    assert first[0] > 0.8 * buffer_bytes
    for read in (first[1], second[0]):
        assert 0.2 * buffer_bytes < read < 0.75 * buffer_bytes
    # The first alone reports.
    assert said.count(f"{run}/report/report.json") == 1

    # The numbers of the undisturbed run: in the log, and in the last checkpoint, whose buffer is whole.
    logged, wanted = ([line for line in metrics(path) if "loss" in line] for path in (run, undisturbed))
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    for ours, theirs in zip(logged[:10], wanted, strict=False):
        tolerance = 1e-5 if theirs["step"] == 1 else 1e-3
        names = theirs.keys() - {"step", "epoch"}
        np.testing.assert_allclose([ours[name] for name in names], [theirs[name] for name in names], rtol=tolerance)
    ours, theirs = (tiny.leaves(restored(path).tree) for path in (run, undisturbed))
    assert ours["buffer"].shape == (SLOTS, 1, 8, 8, 1)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-2, atol=2e-3, err_msg=name)
