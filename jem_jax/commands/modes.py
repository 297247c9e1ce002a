"""Each --mode as a whole: start the devices, hold the workdir, train, evaluate or sample, report."""

import contextlib
import hashlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from jem_jax import config as configuration
from jem_jax import datasets, report
from jem_jax.commands import config_files, export
from jem_jax.common.errors import UserError, printable
from jem_jax.config import Config
from jem_jax.datasets import Dataset
from jem_jax.distributed import devices, processes
from jem_jax.distributed.interrupts import Interrupted, Interrupts
from jem_jax.distributed.processes import Cluster
from jem_jax.report import inputs, sections
from jem_jax.runs import checkpoint, model_folder, workdir
from jem_jax.runs.metrics import duration
from jem_jax.runs.workdir import RunFacts
from jem_jax.training import loop, preflight, quantities, trained

__all__ = ["Cluster", "execute", "settings_of"]

_SHARED_SECONDS = 60


def execute(
    mode: str,
    config: Config,
    path: Path,
    overwrite: bool,
    cluster: Cluster,
    require_devices: int,
    report_dir: Path | None = None,
) -> int:
    """Runs a mode in a workdir and returns the exit status.

    Args:
      mode: "train", "evaluate" or "sample".
      path: the workdir; a model folder but for "train".
      overwrite: delete the run that the workdir holds first; only for "train".
      cluster: how this process finds the others.
      require_devices: refuse to start with fewer.
      report_dir: where reports and samples go; by default the workdir, or runs/<name> where that is only read.

    Raises:
      UserError: in one line, what is wrong and what would be right.
    """
    if overwrite and mode != "train":
        raise UserError(f"--overwrite starts a run anew; it does not go with --mode={mode}")
    if require_devices < 1:
        raise UserError(f"--require_devices must be at least 1, not {require_devices}")
    report.check(config.evaluation)
    report_dir = _report_dir(mode, path, report_dir)
    known = None if overwrite else trained.find_facts(path)
    if mode != "train" and known is None:
        raise UserError(f"{path} holds no run to {mode}; train one first, or name its folder with --workdir")
    dataset = datasets.load(config.data)
    with processes.own_settings():
        processes.start(cluster, _cpu_devices(config, dataset, known, cluster), require_devices)
        try:
            return _in_workdir(mode, config, dataset, path, report_dir, overwrite)
        except BaseException as error:
            processes.exit_without_barrier()
            reason = processes.explain_runtime_error(error)
            if reason is None:
                raise
            raise UserError(reason) from error


def settings_of(path: Path, overrides: Sequence[tuple[str, str]]) -> Config:
    """The settings of what a workdir or a model folder holds, with overrides from the command line.

    Raises:
      UserError: it holds neither, or an override is wrong.
    """
    config = trained.read_facts(path).config
    return config_files.overridden(ml_collections.ConfigDict(configuration.as_dict(config)), overrides)


def _report_dir(mode: str, path: Path, given: Path | None) -> Path:
    """The folder for reports and samples.

    Raises:
      UserError: the folder lies in a model folder, or training would write into one.
    """
    model = model_folder.containing(path)
    if mode == "train" and model is not None:
        raise UserError(
            f"{model} is a model folder, which is only read; train in another --workdir, which can start from it with "
            f"--config.training.init_from={model}"
        )
    if mode == "train":
        if given is not None:
            raise UserError("--report_dir goes with --mode=evaluate and sample; a run's report is in its workdir")
        return path
    only_read = model_folder.is_one(path) or (path.is_dir() and not workdir.is_writable(path))
    folder = given or (Path("runs") / path.resolve().name if only_read else path)
    if model_folder.containing(folder) is not None:
        raise UserError(f"{folder} lies in a model folder, which is only read; name another folder with --report_dir")
    if only_read and folder.resolve() == path.resolve():
        raise UserError(f"{path} cannot be written; name another folder for what is measured with --report_dir")
    return path if folder.resolve() == path.resolve() else folder


def _in_workdir(mode: str, config: Config, dataset: Dataset, path: Path, report_dir: Path, overwrite: bool) -> int:
    if len(set(processes.gather_strings(_fingerprint(mode, config, overwrite)))) > 1:
        raise UserError("the processes were started with different settings; give all of them the same command")
    if len(set(processes.gather_strings(dataset.fingerprint))) > 1:
        raise UserError(f"the processes read different data from {dataset.name}; all must read the same")
    facts = workdir.facts_of(config, dataset, devices.cpu_devices())
    with contextlib.ExitStack() as stack:
        with processes.fail_together():
            if mode == "train":
                # Before anything of an older run is touched.
                checkpoint.check_folder(path)
                preflight.check(config, dataset)
                if config.training.init_from and (overwrite or not checkpoint.steps(path / workdir.CHECKPOINTS)):
                    trained.check_source(config, dataset, path)
            chosen = sections.wanted(config.evaluation) if mode != "sample" else []
            names = {"samples"} if mode == "sample" else {section.name for section in chosen}
            preflight.check_memory(config, dataset, mode == "train", names)
            stack.enter_context(workdir.held(report_dir, processes.is_first()))
            if report_dir == path:
                workdir.prepare(path, facts, overwrite, mode == "train", processes.is_first())
            else:
                workdir.prepare_reports(report_dir, processes.is_first())
                # A model folder may be evaluated on another copy of its data.
                but = ("data.name",) if model_folder.is_one(path) else ()
                workdir.check_reading(path, trained.read_facts(path), facts, but)
        if mode == "train":
            return _train(facts, dataset, path)
        if not processes.is_first():
            return 0
        if mode == "evaluate":
            return _write_report(facts, dataset, path, _seconds(path), report_dir)
        return _sample(facts, dataset, path, report_dir)


def _fingerprint(mode: str, config: Config, overwrite: bool) -> str:
    return hashlib.sha256(repr((mode, config, overwrite)).encode()).hexdigest()


def _cpu_devices(config: Config, dataset: Dataset, known: RunFacts | None, cluster: Cluster) -> int:
    """Devices to make of a CPU: as asked for, as the run had before, or as many as cores and sizes allow."""
    if config.training.cpu_devices:
        return config.training.cpu_devices
    if known is not None and known.cpu_devices:
        return known.cpu_devices
    slots, _ = quantities.buffer_size(config, dataset.num_classes)
    return devices.choose_cpu_devices((*config.training.batch_sizes, slots), cluster.num_processes or 1)


def _train(facts: RunFacts, dataset: Dataset, path: Path) -> int:
    with processes.fail_together():
        if processes.is_first():
            workdir.write_facts(path, facts)
    with processes.fail_together():
        _check_shared(path)
    for name, why in report.missing(facts).items() if processes.is_first() else ():
        _say(f"outside set {name} cannot be had: {why}; unless it is there at the end, the report leaves it out")
    try:
        with Interrupts() as interrupts:
            finished = loop.train(facts.config, dataset, path, "JEM", interrupts)
            seconds = {"training": finished.seconds}
            if facts.config.training.baseline and quantities.weights(facts.config).needs_samples:
                plain = quantities.classifier_config(facts.config)
                seconds["baseline"] = loop.train(
                    plain, dataset, path / workdir.BASELINE, "classifier", interrupts
                ).seconds
            if interrupts.signal is not None:  # it came when the last iteration was done
                raise Interrupted(finished.steps, finished.steps)
    except Interrupted as stop:
        _say(f"{stop}; saved in {path}. The same command goes on from there")
        return 128 + (interrupts.signal or signal.SIGTERM)
    finally:
        if processes.is_first() and not (path / workdir.RUN_FILE).exists():
            # Somebody deleted the folder meanwhile; checkpoints are of no use without it.
            workdir.write_facts(path, facts)
            _say(f"{path} was deleted during the run; what was saved since is there")
    if not processes.is_first():
        return 0
    old = report.read(path)
    if old is not None and report.is_current(old, facts, finished.steps, "baseline" in seconds):
        _say(f"{path} holds a finished run of {finished.steps} iterations; its report:")
        return _show(old)
    return _write_report(facts, dataset, path, seconds, path)


def _check_shared(path: Path) -> None:
    """Makes sure that this process sees what the first one wrote.

    Raises:
      UserError: not even after a network file system had time to show it.
    """
    for _ in range(_SHARED_SECONDS):
        if (path / workdir.RUN_FILE).exists():
            return
        time.sleep(1)
    raise UserError(f"workdir {path} is not the same folder on all processes; it must lie where all can see it")


def _seconds(path: Path) -> dict[str, float]:
    """The seconds of each part of a run, as far as they are known."""
    if model_folder.is_one(path):
        return model_folder.describe(path).about.get("training", {}).get("seconds", {})
    old = report.read(path)
    return old.values["run"]["seconds"] if old else {}


def _write_report(facts: RunFacts, dataset: Dataset, path: Path, seconds: dict[str, float], report_dir: Path) -> int:
    _say("evaluating:")
    return _show(report.write(path, facts, dataset, seconds, _say_piece, report_dir))


def _show(shown: report.Report) -> int:
    print("", *map(printable, report.table(shown).splitlines()), "", sep="\n", flush=True)
    for section, outcome in shown.values["sections"].items():
        if outcome.get("missing"):
            _say(f"section {section} lacks {', '.join(outcome['missing'])}, which could not be had; the page says why")
    for section, failure in shown.failures.items():
        _say(f"section {section} failed: {failure}; --mode=evaluate tries it again")
    _say(f"time: {report.seconds_in_words(shown)}")
    _say("look at:")
    for file in (shown.page, *shown.samples, shown.numbers):
        _say(f"  {file}")
    return 1 if shown.failures else 0


def _sample(facts: RunFacts, dataset: Dataset, path: Path, report_dir: Path) -> int:
    started = time.monotonic()
    model = trained.read_model(path, facts)
    settings = facts.config.evaluation
    _say(f"drawing {settings.num_samples} samples in {inputs.sample_steps(facts.config)} steps …")
    files = export.write(report_dir / workdir.SAMPLES, model, facts, dataset)
    _say(f"took {duration(time.monotonic() - started)}; look at:")
    for file in files:
        _say(f"  {file}")
    return 0


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _say_piece(text: str) -> None:
    # A section's line ends with it.
    print(printable(text.removesuffix("\n")), end="\n" if text.endswith("\n") else "", flush=True)
