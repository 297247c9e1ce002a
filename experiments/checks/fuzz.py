"""The fuzz tests of settings and of files, with many times the examples.

    python -m experiments.checks.fuzz --factor=20

Runs test_fuzz_config.py and test_fuzz_data.py of tests/ with new examples at every call. A failure prints the
example, and the line that repeats it. A factor of 20 takes about five minutes on two cores. The exit status is
pytest's.
"""

import argparse
import os
import subprocess
import sys

from experiments.runs import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factor", type=int, default=20, help="times the examples of the short form (default 20)")
    flags = parser.parse_args()
    files = ["tests/commands/test_fuzz_config.py", "tests/datasets/test_fuzz_data.py"]
    command = [sys.executable, "-m", "pytest", "--no-cov", "--durations=5", *files]
    environment = os.environ | {"FUZZ_FACTOR": str(flags.factor)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
