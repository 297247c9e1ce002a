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

import pytest
from command import HELPERS, SHORTEST, metrics, steps_logged

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


@pytest.mark.slow
@pytest.mark.skipif(not (Path("/proc/self/io").exists() and shutil.which("git")), reason="needs Linux and git")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the recipe sends what git has")
def test_a_pod_starts_stops_at_a_preemption_and_goes_on_with_fewer_hosts(pod, tmp_path):
    run, homes = tmp_path / "runs" / NAME, [tmp_path / f"host{number}" for number in (0, 1)]
    first = pod(2)
    deadline = time.monotonic() + 240
    while steps_logged(run) < 4:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for home in homes:
        assert (home / "installed").read_text() == f"install --quiet -e {home}/jem_jax[tpu]\n"
        assert _notes(home, "code") == [f"{home}/jem_jax/jem_jax/__init__.py"]
    os.kill(_notes(homes[1], "process")[0], signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 143
    stopped = int(re.search(rf"stopped at iteration (\d+) of {STEPS}; saved", said)[1])
    assert "JEM: 4 CPU devices in 2 processes" in said
    for home in homes:
        assert set(_notes(home, "rows")) == {BATCH // 2}

    # With as many hosts each reads the half of the buffer that its devices need; with one host that reads all.
    buffer_bytes = SLOTS * 64 * 4
    second = pod(2)
    while not _notes(homes[1], "restored"):
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.1)
    for number, home in enumerate(homes):
        while len(_notes(home, "restored")) < 1:
            time.sleep(0.1)
        assert 0.2 * buffer_bytes < _notes(home, "restored")[0] < 0.75 * buffer_bytes, number
    os.kill(_notes(homes[1], "process")[1], signal.SIGTERM)
    said, _ = second.communicate(timeout=120)
    assert f"JEM: going on from iteration {stopped} of {STEPS}" in said

    third = pod(1)
    said, _ = third.communicate(timeout=240)
    assert third.returncode == 0, said
    assert "JEM: 2 CPU devices" in said
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, STEPS + 1))
