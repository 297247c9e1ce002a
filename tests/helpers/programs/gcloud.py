"""`gcloud` as docs/launch/tpu_pod.sh calls it, for a slice whose hosts are processes on this machine.

Under $POD each of $POD_HOSTS hosts has a home. A host finds the others as a Slurm task does.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    assert command[:3] == ["compute", "tpus", "tpu-vm"]
    assert f"--zone={os.environ['ZONE']}" in command
    verb, *rest = command[3:]
    if verb == "scp":
        slice_name, _, target = rest[1].partition(":")
        assert slice_name == os.environ["TPU_NAME"]
        shutil.copy(rest[0], target)
        return 0
    assert (verb, rest[0]) == ("ssh", os.environ["TPU_NAME"])
    assert "--worker=all" in rest
    [line] = [word.removeprefix("--command=") for word in rest if word.startswith("--command=")]
    hosts = [_host(number, line) for number in range(int(os.environ["POD_HOSTS"]))]
    return max(host.wait() for host in hosts)


def _host(number: int, line: str) -> subprocess.Popen[bytes]:
    home = Path(os.environ["POD"]) / f"host{number}"
    home.mkdir(exist_ok=True)
    slurm = {
        "SLURM_JOB_ID": os.environ["POD_JOB"],
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": os.environ["POD_HOSTS"],
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
    }
    return subprocess.Popen(["bash", "-c", line], cwd=home, env={**os.environ, **slurm, "HOME": str(home)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
