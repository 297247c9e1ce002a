"""One of two processes that save two folders of checkpoints side by side, the same steps in both.

python -m programs.side_by_side HOST:PORT NUMBER FOLDER
"""

import sys
import time
from pathlib import Path

import numpy as np

from jem_jax.distributed import processes
from jem_jax.runs.checkpoint import Checkpoints

STEPS = 20


def _main(address: str, number: int, folder: Path) -> None:
    processes.start(processes.Cluster(address, 2, number), 1, 2)
    best = Checkpoints(folder / "best", keep=1, writes=processes.is_first())
    regular = Checkpoints(folder / "checkpoints", keep=2, writes=processes.is_first(), after=best)
    tree = {"x": np.zeros((200, 1000), np.float32)}
    for step in range(1, STEPS + 1):
        # Now one of them comes first and now the other.
        time.sleep(0.02 * (step % 2 == number))
        best.save(step, tree, {})
        regular.save(step, tree, {})
    for checkpoints in (best, regular):
        checkpoints.close()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
