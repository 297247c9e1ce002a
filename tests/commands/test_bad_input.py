"""Every wrong command: status 2, one line that says what is wrong and what would be right, and nothing lost."""

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from command import TINY, Command, contents, finished_run, free_port, restored

from jem_jax.common import files
from jem_jax.common.errors import UserError
from jem_jax.datasets import checks
from jem_jax.distributed import processes, rendezvous
from jem_jax.main import main
from jem_jax.runs import workdir
from jem_jax.runs.checkpoint import Checkpoints


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """A function: runs a command that must be refused and gives the one line that it says.

    Whatever lies in the working folder, `tmp_path`, must be there afterwards as it was.
    """
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: str) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before
        return lines[0].removeprefix("jem-jax: ")

    return refused


# Flags and settings


def _cluster(address, count, number):
    return [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={number}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: --config; --help lists the flags"),
        (["--mode=foo"], "invalid choice: 'foo' (choose from"),
        (["--bogus"], "unknown argument '--bogus'; --help lists the flags"),
        (["--epochs=3"], "unknown argument '--epochs=3'; settings are --config.group.key=VALUE; --help lists"),
        (["--config="], "--config is empty; name a path, or leave it out"),
        (["--report_dir=", "--mode=evaluate"], "--report_dir is empty; name a path"),
        (["--config.data.name="], "config.data.name is empty"),
        (["--config.model.norm=\x1b[31m"], r"not '\x1b[31m'"),
        (["--require_devices=many"], "invalid int value: 'many'"),
        (["--config.seed"], "--config.seed needs a value: --config.seed=VALUE"),
        (["--mode=evaluate", "--overwrite"], "--overwrite starts a run anew; it does not go with --mode=evaluate"),
        (["--require_devices=64"], "--require_devices=64, but there are 4 CPU devices"),
        (["--require_devices=0"], "--require_devices must be at least 1"),
        *[(flags.split(), "--coordinator_address, --num_processes and --process_id go together; give all three")
          for flags in ("--process_id=0", "--num_processes=2 --process_id=1", "--distributed --process_id=1")],
        (_cluster("127.0.0.1:4000", 2, 2), "--process_id must be from 0 to 1, not 2"),
        (_cluster("127.0.0.1:4000", 0, 0), "--num_processes must be at least 1, not 0"),
        (_cluster("127.0.0.1", 2, 1), "--coordinator_address must be HOST:PORT, such as 10.0.0.1:1234, not '127.0"),
        *[(_cluster(address, 2, 0), "must be HOST:PORT") for address in ("127.0.0.1:http", "127.0.0.1:99999", ":4000")],
    ],
)  # fmt: skip
def test_a_wrong_flag(refused, arguments, said):
    assert said in refused(*(TINY if arguments else ()), *arguments)


# Sizes and networks, which only a run that is set up can know to be wrong

BATCH, PER_CLASS = "training.batch_size=30", "sampler.class_conditional=true"
FEWER = "gives 12 slots a class, fewer than config.training.batch_size 32; it must be at least 320"
WRONG_SIZES = [
    ([BATCH], "config.training.batch_size 30 does not divide among the 4 devices; 28 and 32 do"),
    (["sampler.buffer_size=126"], "config.sampler.buffer_size 126 does not divide among the 4 devices; 124 and 128 do"),
    (["sampler.buffer_size=1300", PER_CLASS],
     "config.sampler.buffer_size 1300 does not divide among 10 classes × 4 devices; 1280 and 1320 do"),
    (["sampler.buffer_size=120", PER_CLASS], FEWER),
    (["sampler.buffer_size=120", "objective.p_x=0", "objective.p_xy=1"], FEWER),
    (["training.batch_size=2000", "sampler.buffer_size=2000"],
     "config.training.batch_size 2000 is larger than the 1167 training images"),
    (["sampler.buffer_size=400000000"], "GiB; lower config.sampler.buffer_size first"),
    (["training.labelled_batch_size=1200"],
     "config.training.labelled_batch_size 1200 is larger than the 1167 training images"),
    (["data.labels_per_class=1000"], "config.data.labels_per_class 1000 is more than the "),
    (["model.factory=nowhere:network"], "config.model.factory 'nowhere:network' must be package.module:function"),
    (["model.factory=tiny:config"], "config.model.factory 'tiny:config' must be"),
    (["data.pad=8", "data.pad_mode=reflect"],
     "config.data.pad must be less than the images' side 8 to reflect, not 8"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), WRONG_SIZES)
def test_what_does_not_fit(refused, monkeypatch, settings, said):
    monkeypatch.setattr(checks, "memory", lambda: 2**30)
    assert said in refused(*TINY, *(f"--config.{setting}" for setting in settings))


def test_what_does_not_fit_costs_neither_the_run_it_was_to_overwrite_nor_a_new_workdir(refused, run):
    for flags in ([f"--workdir={run}", "--overwrite"], ["--workdir=new"]):
        assert "config.training.batch_size 30" in refused(*TINY, *flags, f"--config.{BATCH}")
    assert not Path("new").exists()


# Devices and processes


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_coordinator_that_does_not_answer(refused, monkeypatch, host):
    monkeypatch.setattr(processes, "_START_SECONDS", 1)
    address = f"{host}:{free_port()}"
    line = refused(*TINY, *_cluster(address, 2, 1))
    assert f"no process of this run answers at --coordinator_address={address}" in line


def test_processes_that_do_not_come(refused, monkeypatch):
    monkeypatch.setattr(processes, "_START_SECONDS", 1)
    line = refused(*TINY, *_cluster(f"127.0.0.1:{free_port()}", 3, 0))
    assert "of 3 processes these did not come in time: 1, 2; all must be started with" in line


def _meet(*calls):
    """What each of several processes, as threads, is told in a rendezvous of (count, number); None where they met."""
    address = f"127.0.0.1:{free_port()}"

    def process(call):
        try:
            return rendezvous.meet(address, *call, 5)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(process, calls))


@pytest.mark.parametrize(
    ("calls", "first", "second"),
    [
        (((2, 0), (3, 1)), "process 1 was started with --num_processes=3, process 0 with 2", "did not all meet"),
        (((3, 0), (3, 1), (3, 1)), "two processes were started with --process_id=1; each needs its own", "0 says why"),
    ],
)
def test_processes_that_disagree(calls, first, second):
    said = _meet(*calls)
    assert said[0] == first
    assert second in said[1]


def test_processes_that_all_come_meet_and_other_callers_neither_count_nor_hold_them_up(monkeypatch):
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 0.2)
    port = free_port()
    meeting = threading.Thread(target=rendezvous.meet, args=(f"127.0.0.1:{port}", 2, 0, 5))
    meeting.start()
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b""):
        with rendezvous._call("127.0.0.1", port, time.monotonic() + 5) as stray:
            stray.sendall(greeting)
    assert meeting.is_alive()
    with rendezvous._call("127.0.0.1", port, time.monotonic() + 5):
        rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 5)
        meeting.join()


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port} .*; name another port"):
            rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 1)


def test_a_cluster_and_an_accelerator_that_are_not_there(tmp_path):
    both = f"from jem_jax.main import main\nassert main({[*TINY, '--distributed']}) == 2\n"
    status, output, errors = Command(*TINY, cwd=tmp_path, before=both, JAX_PLATFORMS="cuda").wait(60)
    assert (status, output) == (2, "")
    cluster, accelerator = errors.splitlines()
    assert "no TPU pod, Slurm or Kubernetes found" in cluster
    assert "no device of platform 'cuda' (JAX_PLATFORMS) could be started" in accelerator
    assert "set JAX_PLATFORMS=cpu" in accelerator
    assert not list(tmp_path.iterdir())


# Workdirs


def test_a_workdir_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "workdir file/run cannot be written: Not a directory; name another" in refused(*TINY, "--workdir=file/run")
    assert "workdir file cannot be written: File exists; name another" in refused(*TINY, "--workdir=file")
    line = refused(*TINY, f"--workdir={tmp_path}/{os.fsdecode(bytes([233]))}")
    assert "\\udce9' is no Unicode text (UTF-8); name another with --workdir" in line


def test_a_workdir_with_a_run_of_other_settings(refused, run):
    line = refused(
        *TINY, f"--workdir={run}", "--config.sampler.num_steps=3", "--config.seed=4", "--config.training.batch_size=16"
    )
    assert f"workdir {run} holds a run of other settings: sampler.num_steps is 2 there, 3 here; " in line
    assert "seed is 0 there, 4 here" in line
    assert "training.batch_size is 32 there, 16 here" in line
    assert line.endswith("Name another with --workdir, or start anew with --overwrite")


def test_a_start_that_was_cut_off_is_not_in_the_way(tmp_path):
    (tmp_path / ".run.json.partial").write_text("{")
    workdir.prepare(tmp_path, workdir.facts_of(tiny.config(), tiny.dataset(), 4), overwrite=False)
    workdir.prepare_empty(tmp_path)


def test_a_workdir_with_files_of_somebody_else(refused, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for flag in ([], ["--overwrite"]):
        line = refused(*TINY, "--workdir=home", *flag)
        assert "workdir home holds 'thesis.tex' but no run" in line
        assert "name an empty one" in line


def test_a_workdir_that_another_run_is_in(refused, run):
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused(*TINY, f"--workdir={run}")
    assert line == f"workdir {run} is in use by another run; wait for it, or name another with --workdir"


@pytest.mark.parametrize("mode", ["evaluate", "sample"])
def test_nothing_to_evaluate_or_sample_from(refused, run, mode):
    assert f"nothing holds no run to {mode}; train one first" in refused(*TINY, f"--mode={mode}", "--workdir=nothing")
    assert not Path("nothing").exists()
    (run / "checkpoints" / "18" / "manifest.json").unlink()
    assert f"{run}/checkpoints holds no finished checkpoint" in refused(*TINY, f"--workdir={run}", f"--mode={mode}")


# Damaged and foreign files in a workdir


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_damaged_checkpoint(refused, run, mode):
    file = max((run / "checkpoints" / "18").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    line = refused(*TINY, f"--workdir={run}", f"--mode={mode}")
    assert f"checkpoint {run}/checkpoints/18 is damaged" in line
    assert str(file.relative_to(run / "checkpoints" / "18")) in line
    assert mode == "train" or "restore it from a copy" in line


def _replace_checkpoint(run: Path, change) -> None:
    """Puts another tree in the place of the last checkpoint, whole and with a manifest."""
    found = restored(run)
    change(found.tree["state"]["params"], found.tree)
    shutil.rmtree(run / "checkpoints")
    checkpoints = Checkpoints(run / "checkpoints", 2)
    checkpoints.save(found.step, found.tree, found.note)
    checkpoints.close()


@pytest.mark.parametrize(
    ("mode", "change", "named"),
    [
        ("train", lambda params, _: params.update(another=params.pop("hidden")), "another"),
        ("evaluate", lambda _, tree: tree.update(buffer=tree["buffer"][:64]),
         "buffer as float32 (64, 1, 8, 8, 1); this run's is float32 (128, 1, 8, 8, 1)"),
        ("train", lambda _, tree: tree.pop("buffer"), "lacks buffer"),
    ],
    ids=["layers", "smaller buffer", "no buffer"],
)  # fmt: skip
def test_a_checkpoint_of_another_run(refused, run, change, named, mode):
    _replace_checkpoint(run, change)
    line = refused(*TINY, f"--workdir={run}", f"--mode={mode}")
    assert f"checkpoint {run}/checkpoints/18 " in line
    assert named in line.removeprefix(f"checkpoint {run}/checkpoints/18 is not one of this run's network and buffer")
    assert mode == "evaluate" or "start anew with --overwrite" in line


def test_a_damaged_run_file(refused, run):
    for text, mode in (("{", "train"), ("[]", "evaluate"), ('{"config": {}}', "train"), ("", "evaluate")):
        (run / "run.json").write_text(text)
        line = refused(*TINY, f"--workdir={run}", f"--mode={mode}")
        assert f"{run}/run.json is damaged" in line
        assert "start anew with --overwrite" in line
    facts = json.loads((finished_run() / "run.json").read_text())
    facts["config"]["sampler"]["temperature"] = 1.0
    (run / "run.json").write_text(json.dumps(facts))
    line = refused(*TINY, f"--workdir={run}")
    assert "run.json" in line
    assert "config.sampler.temperature" in line


def test_a_name_that_is_no_text_is_written_out(tmp_path):
    files.write_text(tmp_path / "report.html", f"data: {os.fsdecode(bytes([233]))}\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "data: \\udce9\n"
