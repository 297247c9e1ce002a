"""Fills the tables of README.md, results.md and performance.md from the raw results.

    python -m experiments.make_tables

Pages are written by hand. Between the marks `<!-- table: NAME -->` and `<!-- end -->` stands what `TABLES[NAME]` makes
of experiments/results/*.json: a table, and the command and machine of its numbers. Runs in a second.
"""

import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from experiments.runs import RESULTS, ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "pages" / "results.md", ROOT / "docs" / "pages" / "performance.md")
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Numbers = Mapping[str, Any]
SHIPPED = "../models/fashion_mnist/model"
MODELS = {"jem": "JEM", "baseline": "classifier"}
SCORES = {
    "approximate_mass": "-\\|∇ log p~(x)\\|",
    "log_density": "log p~(x)",
    "max_posterior": "max log p(y\\|x)",
    "refine_distance": "-\\|x - x′\\|",
}
NORMS = {"linf": "L∞", "l2": "L2"}
LEVERS_OFF_BY_DEFAULT = (
    "huge pages", "convolutions and loop in graphs", "fused convolutions", "eight elements a thread",
    "batches of twice the size", "unrolled", "NHWC", "NCHW",
)  # fmt: skip

PARAMETERS = 36_471_338
"""of a WRN-28-10 with 10 classes"""
# Published link speeds, bytes/s in one direction.
LINKS = (
    ("H200, NVLink within 8", 450e9, (8,), "NVIDIA H200 data sheet: 900 GB/s both ways together"),
    ("H200, InfiniBand NDR", 50e9, (64, 512), "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port, one a GPU"),
)


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"filled {page.relative_to(ROOT)}")


def fill(text: str) -> str:
    """A page with its tables made anew.

    Raises:
      KeyError: a mark names no table.
    """
    return MARKED.sub(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}\n{mark[3]}", text)


def read(name: str) -> dict[str, Any]:
    """experiments/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], result: Numbers | None = None) -> str:
    """A Markdown table of cells that hold no unescaped bar, and under it where the numbers of `result` are from."""
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"{text}\n\n{source(result)}" if result else text


def source(result: Numbers) -> str:
    """The command of a result and its machine."""
    machine = [result[name] for name in ("device", "cpu") if name in result]
    parts = [f"`{result['command']}`", *machine, f"{result['cores']} cores" if "cores" in result else ""]
    return f"{', '.join(filter(None, parts))}."


def spread(values: Sequence[float] | Numbers, form: str = "{:.3f}") -> str:
    """Mean (least to greatest, where they differ) of numbers, or of a stored {mean, low, high}."""
    if not isinstance(values, Mapping):
        values = {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
    mean, low, high = (form.format(values[name]) for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def percent(value: Numbers) -> str:
    """A stored {mean, low, high} of fractions, in %."""
    return spread({name: 100 * value[name] for name in ("mean", "low", "high")}, "{:.1f}")


def words(name: str) -> str:
    """A name of the report in words."""
    return name.replace("_", " ")


def bold_best(values: Sequence[float], texts: Sequence[str], best: Callable[[Sequence[float]], float]) -> list[str]:
    """The texts, the best in bold."""
    return [f"**{text}**" if value == best(values) else text for value, text in zip(values, texts, strict=True)]


# --- README ---


def overview() -> str:
    """One row a config that has a stored run."""
    digits = read("digits_seeds")
    jem, seconds = digits["summary"]["jem"], digits["summary"]["command"]["training_seconds"]
    auroc = statistics.mean(scores["log_density"]["mean"] for scores in jem["auroc"].values())
    rows = [
        (_named("digits", "digits_seeds"), f"{spread(seconds, '{:.0f}')} s, 2 CPU cores", percent(jem["accuracy"]),
         percent(jem["ece"]), f"{auroc:.2f}", percent(jem["pgd"]["l2"]["0.5"]), "")
    ]  # fmt: skip
    for name, stored, machine, model in (
        ("digits_jempp", "digits_jempp", "2 CPU cores", ""),
        ("digits_sada", "digits_sada", "2 CPU cores", ""),
        ("fashion_mnist", "fashion_mnist", "2 CPU cores", ""),
        ("cifar10_fast", "cifar10_fast", "one H200", ""),
        ("cifar10_ten_minutes", "queue/ten_minutes", "one H200", "cifar10"),
    ):
        rows.append((_named(name, stored), *_run_cells(_with_scores(stored, model), machine), _model(model)))
    name = _named("fashion_mnist_fast", SHIPPED)
    rows.append((name, *_run_cells(_with_scores(SHIPPED, "fashion_mnist"), "2 CPU cores"), _model("fashion_mnist")))
    heads = ("config, raw result", "training", "test accuracy, %", "ECE, %", "AUROC, log p~", "PGD L2 0.5, %", "model")
    return table(heads, rows)


def _with_scores(stored: str, model: str) -> Numbers:
    """A stored run, with what was measured afterwards of the model folder that it became."""
    run = stored_run(stored)[1]
    return {**run, "jem": run["jem"] | read(f"{model}_model")["jem"]} if model else run


def stored_run(stored: str) -> tuple[str, Numbers]:
    """The command of a stored run as today's config takes it, and its `jem` and `run`."""
    found = read(stored)
    if "about" in found:
        command = "python -m jem_jax.main --config=configs/fashion_mnist_fast.py"
        return command, {"jem": found["about"]["results"], "run": found["about"]["training"]}
    command = found.get("command_with_todays_config", found["command"])
    return command, found["runs"][0] if "runs" in found else found.get("report") or found


def _named(config: str, stored: str) -> str:
    path = (RESULTS / f"{stored}.json").resolve().relative_to(ROOT)
    return f"[`{config}.py`](configs/{config}.py), [raw]({path})"


def _model(name: str) -> str:
    return f"[{name}](experiments/models/{name})" if name else ""


def _run_cells(run: Numbers, machine: str) -> tuple[str, ...]:
    """Training, accuracy, ECE, mean AUROC of log p~ and robust accuracy of one run; a dash where not measured."""
    jem, seconds = run["jem"], run["run"].get("seconds", {}).get("training")
    scores = [found["log_density"]["auroc"] for found in jem.get("ood", {}).values()]
    robust = jem.get("pgd", {}).get("l2", {}).get("0.5")
    return (
        f"{seconds:.0f} s, {machine}" if seconds else machine,
        f"{100 * jem['accuracy']:.1f}",
        f"{100 * jem['ece']:.1f}",
        f"{statistics.mean(scores):.2f}" if scores else "–",
        "–" if robust is None else f"{100 * robust:.1f}",
    )


def model_scores() -> str:
    """What the models' scores detect, and what an attack leaves of their accuracy."""
    found = {name: read(f"{name}_model") for name in ("cifar10", "cifar10_late_p_x", "fashion_mnist")}
    sets = list(dict.fromkeys(key for result in found.values() for key in result["jem"]["ood"]))
    rows = [(key.replace("_", " "), *(_aurocs(result["jem"]["ood"].get(key, {})) for result in found.values()))
            for key in sets]  # fmt: skip
    for norm, epsilon, title in (("l2", "0", "no attack"), ("l2", "0.5", "L2 0.5"), ("linf", "0.03", "L∞ 0.03")):
        accuracies = [result["jem"]["pgd"][norm][epsilon] for result in found.values()]
        rows.append((f"accuracy, {title}, %", *(f"{100 * accuracy:.1f}" for accuracy in accuracies)))
    commands = "\n\n".join(
        f"`{result['command']}`, {result['seconds']} s, {result['machine']}." for result in found.values()
    )
    return f"{table(('', *found), rows)}\n\n{commands}"


def _aurocs(scores: Mapping[str, Any]) -> str:
    """The AUROCs of log p~, -|∇ log p~| and max p(y|x), as far as they were measured."""
    kinds = ("log_density", "approximate_mass", "max_posterior")
    return " / ".join(f"{scores[kind]['auroc']:.2f}" for kind in kinds if kind in scores) or "–"


# --- results.md: digits ---


def digits_classification() -> str:
    """What both models are as classifiers."""
    found = read("digits_seeds")
    columns = {"accuracy, %": "accuracy", "NLL, nats": "nll", "Brier": "brier", "ECE, %": "ece"}
    rows = [
        (title, *((percent if "%" in head else spread)(found["summary"][model][key]) for head, key in columns.items()))
        for model, title in MODELS.items()
    ]
    return table(("", *columns), rows, found)


def digits_ood() -> str:
    """AUROC of every score on every set; a row of each model."""
    found = read("digits_seeds")
    auroc = {model: found["summary"][model]["auroc"] for model in MODELS}
    cells: dict[tuple[str, str], list[str]] = {(score, model): [] for score in SCORES for model in MODELS}
    for name, score in itertools.product(auroc["jem"], SCORES):
        values = [auroc[model][name][score] for model in MODELS]
        texts = bold_best([value["mean"] for value in values], [spread(value) for value in values], max)
        for model, text in zip(MODELS, texts, strict=True):
            cells[score, model].append(text)
    rows = [(f"{SCORES[score]}, {MODELS[model]}", *row) for (score, model), row in cells.items()]
    return table(("score", *map(words, auroc["jem"])), rows, found)


def digits_attacks(norm: str) -> str:
    """Accuracy under PGD-20 of growing size."""
    found = read("digits_seeds")
    sizes = found["summary"]["jem"]["pgd"][norm]
    rows = [
        (title, *(percent(found["summary"][model]["pgd"][norm][size]) for size in sizes))
        for model, title in MODELS.items()
    ]
    return table((f"{NORMS[norm]} ε", *sizes), rows, found)


def digits_refined() -> str:
    """Accuracy after n SGLD steps, attacked through them."""
    found = read("digits_seeds")
    refined = found["summary"]["jem"]["pgd_refined"]
    rows = []
    for name, values in refined.items():
        _, steps, mode = name.split("_", 2)
        how = "" if steps == "0" else f", {words(mode)}"
        rows.append((f"JEM-{steps}{how}", *map(percent, values.values())))
    return table(("L∞ ε", *next(iter(refined.values()))), rows, found)


def digits_samples() -> str:
    """What the other model says of samples."""
    found = read("digits_seeds")
    rows = [
        (title, spread(value["mean_confidence"]), percent(value["rarest_class"]), percent(value["commonest_class"]))
        for title, value in (
            ("replay buffer", found["summary"]["replay_buffer"]),
            ("fresh chains, 500 steps", found["summary"]["fresh_chains"]),
        )
    ]
    return table(("", "confidence", "rarest class, %", "commonest class, %"), rows, found)


def digits_distal() -> str:
    """How far from noise each model is sure of a class, and whether the other agrees."""
    found = read("digits_seeds")
    rows = [
        (MODELS[model], f"{distal['median_steps']['mean']:.0f}", percent(distal["taken_for_the_class_by_the_other"]))
        for model in MODELS
        for distal in (found["summary"][model]["distal"],)
    ]
    return table(("", "median steps", "other model agrees, %"), rows, found)


def digits_claims() -> str:
    """Factorisations, and few labels."""
    found = read("digits_claims")
    rows = []
    for name, values in found["summary"].items():
        accuracies = [
            percent({end: values[model][f"accuracy_{key}"] for end, key in
                     (("mean", "mean"), ("low", "min"), ("high", "max"))})
            for model in MODELS
        ]  # fmt: skip
        rows.append(
            (name.replace("|", "\\|"), *accuracies, *(f"{100 * values[model]['ece_mean']:.1f}" for model in MODELS))
        )
    return table(("training", "JEM, %", "classifier, %", "JEM's ECE, %", "classifier's ECE, %"), rows, found)


# --- results.md: ablation ---

GRADIENT = f"AUROC of {SCORES['approximate_mass']}"


def mean_auroc(run: Numbers, score: str) -> float:
    """Over three of the sets of other images."""
    return statistics.mean(run["auroc"][name][score] for name in ("midpoints_of_classes", "rotated", "photographs"))


ABLATION: dict[str, tuple[Callable[[Numbers], float], str, int]] = {
    "accuracy, %": (lambda run: 100 * run["accuracy"], "{:.1f}", 1),
    "ECE, %": (lambda run: 100 * run["ece"], "{:.1f}", -1),
    GRADIENT: (partial(mean_auroc, score="approximate_mass"), "{:.2f}", 1),
    "AUROC of log p~(x)": (partial(mean_auroc, score="log_density"), "{:.2f}", 1),
    "under PGD, %": (lambda run: 100 * run["pgd_linf"], "{:.0f}", 1),
    "buffer's Fréchet distance": (lambda run: run["buffer"]["frechet_distance"], "{:.1f}", -1),
    "buffer's confidence": (lambda run: run["buffer"]["mean_confidence"], "{:.2f}", 1),
    "training, s": (lambda run: run["training_seconds"], "{:.0f}", 0),
    "recoveries": (lambda run: run["recoveries"], "{:.1f}", -1),
}
"""{name: (value of a run, how it is written, 1 where more is better, -1 where less is, 0 where it is not compared)}"""


def by_variant(stored: Numbers) -> dict[str, list[Numbers]]:
    """The runs of all seeds, by the name of the variant."""
    runs: dict[str, list[Numbers]] = {}
    for name, run in stored["runs"].items():
        runs.setdefault(name.rpartition("/")[0], []).append(run)
    return runs


def column_values(runs: Sequence[Numbers], column: str) -> list[float]:
    """A column of the runs that ended with a model."""
    return [ABLATION[column][0](run) for run in runs if "failed" not in run]


def ablation(name: str) -> str:
    """A row a variant."""
    found = read(f"ablation_{name}")
    rows = []
    for variant, runs in by_variant(found).items():
        values = {column: column_values(runs, column) for column in ABLATION}
        cells = [spread(some, ABLATION[column][1]) if some else "" for column, some in values.items()]
        rows.append((variant, *cells, f"{sum('failed' in run for run in runs)} of {len(runs)}"))
    return table(("", *ABLATION, "without a model"), rows, found)


def ablation_changes(name: str) -> str:
    """What each part changed: columns in which all seeds of a row are better, or worse, than all of the row above."""
    runs = {variant: some for variant, some in by_variant(read(f"ablation_{name}")).items() if "," not in variant}
    pairs = [*itertools.pairwise(runs), (next(iter(runs)), list(runs)[-1])]
    rows = []
    for before, after in pairs:
        better, worse = [], []
        for column, (_, _, sign) in ABLATION.items():
            old, new = ([sign * value for value in column_values(runs[one], column)] for one in (before, after))
            if sign and old and new and min(new) > max(old):
                better.append(column.partition(", ")[0])
            if sign and old and new and max(new) < min(old):
                worse.append(column.partition(", ")[0])
        title = after if (before, after) != pairs[-1] else "all of them, beside JEM"
        rows.append((title, "; ".join(better), "; ".join(worse)))
    return table(("part", "better", "worse"), rows)


# --- results.md: single runs ---


def single_runs(titles: Mapping[str, str]) -> str:
    """A row each of runs that were measured as classifiers alone, {stored: title}."""
    rows, sources = [], []
    for stored, title in titles.items():
        command, run = stored_run(stored)
        jem, facts = run["jem"], run["run"]
        ece = f"{100 * jem['ece']:.1f}" if "ece" in jem else "–"
        rows.append((title, f"{100 * jem['accuracy']:.1f}", f"{jem['nll']:.3f}", ece, f"{jem['iteration']:,}",
                     f"{facts['seconds']['training']:.0f}"))  # fmt: skip
        sources.append(source({"command": command, "device": facts["devices"]}))
    heads = ("", "accuracy, %", "NLL, nats", "ECE, %", "iterations", "training, s")
    return "\n\n".join((table(heads, rows), *sources))


def one_run(name: str) -> tuple[Numbers, Numbers, list[str]]:
    """What is stored of one run, the run, and the models that it has."""
    found = read(name)
    run = found["runs"][0]
    return found, run, [model for model in MODELS if run.get(model)]


def run_classification(name: str) -> str:
    """Classification and calibration, the better model in bold."""
    found, run, models = one_run(name)
    columns = {"accuracy, %": "accuracy", "NLL, nats": "nll", "Brier": "brier", "ECE, %": "ece",
               "ECE after temperature scaling, %": "ece_scaled"}  # fmt: skip
    cells = []
    for head, key in columns.items():
        values = [run[model][key] for model in models]
        texts = [f"{100 * value:.1f}" if "%" in head else f"{value:.3f}" for value in values]
        better = bold_best(values, texts, max if key == "accuracy" else min)
        cells.append(better if len(models) > 1 else texts)
    temperatures = [f"{run[model]['temperature']:.2f}" for model in models]
    rows = zip((MODELS[model] for model in models), *cells, temperatures, strict=True)
    return table(("", *columns, "temperature"), rows, found)


def run_ood(name: str) -> str:
    """AUROC of three scores on every set, the better model in bold."""
    found, run, models = one_run(name)
    sets = run["jem"]["ood"]
    rows = []
    for score in list(SCORES)[:3]:
        columns = []
        for one in sets:
            values = [run[model]["ood"][one][score]["auroc"] for model in models]
            texts = [f"{value:.3f}" for value in values]
            columns.append(bold_best(values, texts, max) if len(models) > 1 else texts)
        for model, *row in zip(models, *columns, strict=True):
            rows.append((f"{SCORES[score]}, {MODELS[model]}", *row))
    return table(("AUROC", *map(words, sets)), rows, found)


def run_attacks(name: str) -> str:
    """Accuracy under PGD-20."""
    found, run, models = one_run(name)
    sizes = [(norm, size) for norm in NORMS for size in run["jem"]["pgd"][norm] if float(size)]
    rows = [
        (MODELS[model], *(f"{100 * run[model]['pgd'][norm][size]:.1f}" for norm, size in sizes)) for model in models
    ]
    return table(("accuracy under PGD-20, %", *(f"{NORMS[norm]} {float(size):g}" for norm, size in sizes)), rows, found)


def run_samples(name: str) -> str:
    """The Fréchet distance to the training images in the network's own features."""
    found, run, _ = one_run(name)
    quality = run["jem"]["sample_quality"]
    rows = [(title, f"{value['frechet_distance']:.3g}") for title, value in quality.items()]
    return table(("", "Fréchet distance"), rows, found)


# --- results.md: divergence ---


def divergence_runs() -> dict[str, list[Numbers]]:
    """{"setting: variant", or "healthy NAME": runs of all seeds}."""
    return by_variant(read("divergence"))


def divergence(setting: str) -> str:
    """How the runs of a setting that diverges end, by variant."""
    rows = []
    for name, runs in divergence_runs().items():
        if name.startswith(f"{setting}: "):
            accuracy = statistics.median(run["accuracy"] or 0 for run in runs)
            rows.append((
                name.partition(": ")[2], f"{sum(run['works'] for run in runs)} of {len(runs)}",
                sum(bool(run["error"]) for run in runs), f"{100 * accuracy:.0f}",
                sum(len(run["recoveries"]) for run in runs),
            ))  # fmt: skip
    heads = ("", "working models", "ended early", "median last accuracy, %", "recoveries")
    return table(heads, rows, read("divergence"))


def healthy() -> str:
    """Alarms and extremes of runs that do not diverge."""
    rows = []
    for name, runs in divergence_runs().items():
        if name.startswith("healthy "):
            spans = [
                f"{min(run[kind][0] for run in runs):.2f} to {max(run[kind][1] for run in runs):.2f}"
                for kind in ("spread", "rms")
            ]
            rows.append((
                name.removeprefix("healthy "), len(runs), f"{sum(run['seconds'] for run in runs) / 60:.0f}",
                f"{sum(run['iterations'] for run in runs):,}", sum(len(run["recoveries"]) for run in runs),
                f"{max(run['largest_gap'] for run in runs):.2f}", *spans,
            ))  # fmt: skip
    heads = ("", "runs", "minutes", "iterations", "alarms", "largest gap, nats", "spread", "rms")
    return table(heads, rows, read("divergence"))


# --- performance.md ---


def rate(seconds: Numbers, low: str = "low", high: str = "high") -> str:
    """Iterations a second: the median, and in brackets the least and the greatest."""
    return f"{1 / seconds['median']:.3g} ({1 / seconds[high]:.3g} to {1 / seconds[low]:.3g})"


def last_line(text: str) -> str:
    """Of an error, for a cell of a table."""
    return text.strip().splitlines()[-1][:120].replace("|", "/") if text.strip() else ""


def benchmark(preset: str) -> str:
    """A row a case and program."""
    found = read(f"benchmark_{preset}")
    rows = [row for case in found["summary"]["cases"] for row in benchmark_rows(case)]
    heads = ("case", "program", "iterations/s", "speed-up over official style", "TFLOP/s (share of peak)", "peak MiB",
             "first step cold, s")  # fmt: skip
    products = ", ".join(
        f"{value / 1e12:,.3g} TFLOP/s in {dtype}" for dtype, value in found["summary"]["products_flops"].items()
    )
    return f"{table(heads, rows, found)} Peak: its matrix products, {products}."


def benchmark_rows(case: Numbers) -> list[tuple[Any, ...]]:
    """The programs of a case, and those that failed."""
    programs = case["programs"]
    # PyTorch's official style may run at several settings: one speed-up for each, in their order.
    official = [one["iteration_seconds"]["median"] for one in programs if "official" in one["program"]]
    rows: list[tuple[Any, ...]] = []
    for one in programs:
        cold = one.get("compile_seconds")
        rows.append((
            case["case"], one["program"], rate(one["iteration_seconds"]),
            " / ".join(f"{other / one['iteration_seconds']['median']:.2f}" for other in official),
            f"{one['flops_per_second'] / 1e12:.3g} ({one['share_of_products']:.0%})",
            f"{one['memory']['bytes'] / 2**20:,.0f}", "" if cold is None else f"{cold:.1f}",
        ))  # fmt: skip
    for name, reason in case.get("failed", {}).items():
        rows.append((case["case"], name, f"failed: {last_line(reason)}", *[""] * 4))
    return rows


def growth(preset: str) -> str:
    """How an iteration's time grows with each size."""
    found = read(f"scaling_{preset}")
    rows = [
        (axis, f"{point['value']:,}", rate({"median": point["seconds"], **point}),
         f"{1 / point['expected_seconds']:.3g}")
        for axis, points in found["summary"]["points"].items()
        for point in points
    ]  # fmt: skip
    return table(("size", "value", "iterations/s", "expected"), rows, found)


def parts(preset: str) -> str:
    """Where the time of an iteration goes."""
    found = read(f"scaling_{preset}")
    seconds = found["summary"]["parts"]
    rest = seconds["iterations"] - seconds["chains"] - seconds["losses"]
    named = {"chain": seconds["chains"], "loss and its gradients": seconds["losses"], "rest": rest}
    return table(("part", "ms"), [(name, f"{1e3 * value:.1f}") for name, value in named.items()], found)


def agreement() -> str:
    """What bfloat16 trains to beside float32."""
    found = read("bfloat16_agreement")
    rows = [
        (name, f"{value['float32']:.4g}", f"{value['bfloat16']:.4g}", f"{value['spread_of_seeds']:.2g}",
         "yes" if value["agrees"] else "**no**")
        for name, value in found["summary"].items()
    ]  # fmt: skip
    times = [
        statistics.median(run["iteration_seconds"] for run in found["runs"][dtype]) for dtype in ("float32", "bfloat16")
    ]
    rows.append(("iteration, ms", *(f"{1e3 * value:.0f}" for value in times), "", ""))
    return table(("quantity", "float32", "bfloat16", "spread of seeds", "agrees"), rows, found)


def profiles(preset: str) -> tuple[Numbers, list[Numbers]]:
    """What profile_step.py stored, or what the benchmark did on its way."""
    if (RESULTS / f"profile_{preset}.json").exists():
        found = read(f"profile_{preset}")
        return found, found["summary"]
    found = read(f"benchmark_{preset}")
    return found, [
        {"case": f"{program['program']}, {case['case']}", **program["profile"]}
        for case in found["summary"]["cases"]
        for program in case["programs"]
        if "profile" in program
    ]


def profile(preset: str) -> str:
    """Time of a device by kind of kernel."""
    found, cases = profiles(preset)
    rows = [
        (case["case"], kind, f"{1e3 * seconds:.2f}", f"{seconds / case['kernel_seconds']:.0%}")
        for case in cases
        for kind, seconds in case["kinds"].items()
    ]
    return table(("training", "kind", "ms an iteration", "share"), rows, found)


def gpu_program() -> str:
    """What XLA gives a GPU to do."""
    found = read("gpu_program")
    programs = found["summary"]["programs"]
    kinds = list(programs[0]["chain_step"])
    rows = [
        (program["case"], program["kernels"], where, sum(program[part].values()),
         *(program[part][kind] for kind in kinds))
        for program in programs
        for part, where in (("chain_step", "a step of the chain"), ("outside", "the rest of an iteration"))
    ]  # fmt: skip
    return table(("training", "kernels", "where", "launches", *kinds), rows, found)


def levers(preset: str) -> str:
    """The iteration with each lever and without it."""
    found = read(f"levers_{preset}")
    rest = read(f"levers_{preset}_rest")["summary"] if (RESULTS / f"levers_{preset}_rest.json").exists() else []
    rows: list[tuple[Any, ...]] = []
    for case in [*found["summary"], *rest]:
        for name, seconds in case["seconds"].items():
            if name != "all":
                added = name in LEVERS_OFF_BY_DEFAULT
                pair = (seconds, case["seconds"]["all"]) if added else (case["seconds"]["all"], seconds)
                on, off = (one["median"] for one in pair)
                cells = f"{1e3 * on:.3g}", f"{1e3 * off:.3g}", f"{off / on:.2f}"
                rows.append((name, "no" if added else "yes", case["case"], *cells))
        for name, reason in case.get("failed", {}).items():
            default = "no" if name in LEVERS_OFF_BY_DEFAULT else "yes"
            rows.append((name, default, case["case"], f"failed: {last_line(reason)}", "", ""))
    return table(("lever", "default", "case", "with, ms", "without, ms", "speed-up"), rows, found)


def versions() -> str:
    """How fast versions of JAX are on a CPU."""
    found = read("jax_versions")
    rows = []
    for case in found["summary"]:
        first = next(iter(case["versions"].values()))["iterations"]["median"]
        for version, measured in case["versions"].items():
            iterations = {name: 1e3 * measured["iterations"][name] for name in ("median", "low", "high")}
            rows.append((
                case["case"], version, spread({**iterations, "mean": iterations["median"]}, "{:.1f}"),
                f"{measured['iterations']['median'] / first:.2f}", f"{1e3 * measured['chains']['median']:.1f}",
                f"{1e3 * measured['losses']['median']:.1f}",
            ))  # fmt: skip
    heads = ("case", "version", "iteration, ms", "times the first", "chain, ms", "loss, ms")
    return table(heads, rows, found)


def watch() -> str:
    """What watching for divergence costs."""
    found = read("watch_cost")
    times, ratios = found["summary"]["milliseconds"], found["summary"]["ratio_of_rounds"]
    row = (f"{times['with']:.1f}", f"{times['without']:.1f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
    return table(("with, ms", "without, ms", "ratio in each round"), [row], found)


def tpu_program() -> str:
    """What TPU's compiler makes of the training step, on each chip."""
    found = read("tpu_program")
    heads = ("program", "arguments, MiB", "temporary, MiB", "all-reduces", "exchanged, MB", "copies in the chain",
             "lanes filled", "padding written", "TFLOP", "roof, ms")  # fmt: skip
    rows = []
    for name, program in found["summary"]["programs"].items():
        exchanges = program["collectives"]
        rows.append((
            f"`{name}`", f"{program['argument_bytes'] / 2**20:,.0f}", f"{program['temporary_bytes'] / 2**20:,.0f}",
            len(exchanges), f"{sum(one['bytes'] for one in exchanges) / 1e6:.1f}",
            len(program["chain_copies"]), f"{program['lanes_filled']:.0%}", f"{program['memory_padding']:.0%}",
            f"{program['flops'] / 1e12:.3g}", f"{max(program['roof_ms'].values()):.3g}",
        ))  # fmt: skip
    missing = ", ".join(f"`{name}`" for name in found["summary"]["not_compiled"])
    return table(heads, rows, found) + (f" Not compiled: {missing}." if missing else "")


def tpu_chips() -> str:
    """A model of data parallelism on TPUs, from the arithmetic and the bytes of compiled programs."""
    found = read("tpu_program")
    rows = []
    for name, program in found["summary"]["programs"].items():
        compute = program["roof_ms"]["arithmetic"]
        payload = sum(one["bytes"] for one in program["collectives"])
        for count in (8, 64, 256, 512):
            if count <= program["pod_chips"]:
                exchange = 1e3 * 2 * (count - 1) / count * payload / program["link_bytes_per_second"]
                rows.append((f"`{name}`", count, f"{sum(program['batch_a_chip']) * count:,}", f"{compute:.3g}",
                             f"{exchange:.2g}", f"{compute / (compute + exchange):.1%}"))  # fmt: skip
    return table(("program", "chips", "images in a batch", "compute, ms", "all-reduce, ms", "efficiency"), rows, found)


def several_chips() -> str:
    """A model of data parallelism, from arithmetic and link speeds."""
    measured = read("benchmark_gpu")["summary"]
    case = next(case for case in measured["cases"] if case["case"].startswith("WRN-28-10"))
    compute = case["flops"] / measured["products_flops"]["bfloat16"]
    rows = []
    for name, link, chips, origin in LINKS:
        for count in chips:
            exchange = 2 * (count - 1) / count * 4 * PARAMETERS / link
            rows.append((name, count, f"{1e3 * compute:.0f}", f"{1e3 * exchange:.2f}",
                         f"{compute / (compute + exchange):.1%}", origin))  # fmt: skip
    heads = ("chips", "number", "compute, ms", "all-reduce, ms", "efficiency", "link speed from")
    return table(heads, rows, read("benchmark_gpu"))


def waiting() -> str:
    """What the main command and the tests take, beside another commit."""
    found = read("minutes")
    names = {
        "cpu_seconds": "CPU time, s", "seconds": "wall clock, s", "first_metrics": "first line of metrics, s",
        "first_picture": "first picture of samples, s", "compilations": "compilations of 0.1 s or more",
        "long_compilations": "compilations of 0.2 s or more", "peak_memory_mib": "peak MiB",
    }  # fmt: skip
    kinds = {"cold": "first run", "warm": "second run"}
    measured = [
        (f"{kinds[kind]}: {names[name]}", value)
        for kind, values in found["summary"].get("command", {}).items()
        for name, value in values.items()
        if name in names
    ]
    measured += [
        (f"tests, {kind}: {names[name]}", value)
        for kind, values in found["summary"].get("tests", {}).items()
        for name, value in values.items()
    ]
    if "step" in found["summary"]:
        measured.append(("an iteration with the paper's settings, ms", found["summary"]["step"]))
    ratio = lambda value: spread({**value, "mean": value["ratio"]}, "{:.2f}") if "ratio" in value else ""  # noqa: E731
    number = lambda value: "" if value is None else f"{value:,.4g}"  # noqa: E731
    rows = [
        (title, *(number(value.get(side)) for side in ("before", "now")), ratio(value)) for title, value in measured
    ]
    return table(("", "before", "now", "ratio"), rows, found)


TABLES: dict[str, Callable[[], str]] = {
    "waiting": waiting,
    "overview": overview,
    "digits-classification": digits_classification,
    "digits-ood": digits_ood,
    "digits-linf": partial(digits_attacks, "linf"),
    "digits-l2": partial(digits_attacks, "l2"),
    "digits-refined": digits_refined,
    "digits-samples": digits_samples,
    "digits-distal": digits_distal,
    "digits-claims": digits_claims,
    "digits-successors": partial(single_runs, {"digits_jempp": "JEM++", "digits_sada": "SADA-JEM"}),
    "cifar10-ten-minutes": partial(single_runs, {"queue/ten_minutes": "JEM, norm frozen from 60 % on",
                                                 "queue/running_norm": "JEM, norm never frozen",
                                                 "queue/ten_minutes_late_p_x": "JEM, p(x) from 40 % on",
                                                 "queue/classifier": "cross-entropy alone"}),
    "fashion-mnist-fast": partial(single_runs, {SHIPPED: "JEM"}),
    "model-scores": model_scores,
    "divergence-few-steps": partial(divergence, "few steps"),
    "divergence-harsh": partial(divergence, "harsh"),
    "divergence-healthy": healthy,
    "agreement": agreement,
    "gpu-program": gpu_program,
    "tpu-program": tpu_program,
    "tpu-chips": tpu_chips,
    "versions": versions,
    "watch": watch,
    "several-chips": several_chips,
    "cifar10-samples": partial(run_samples, "cifar10_fast"),
    **{f"ablation-{name}": partial(ablation, name.replace("-", "_")) for name in ("digits", "fashion-mnist")},
    **{f"changes-{name}": partial(ablation_changes, name.replace("-", "_")) for name in ("digits", "fashion-mnist")},
    **{
        f"{name}-{what}": partial(make, stored)
        for name, stored in (("fashion-mnist", "fashion_mnist"), ("cifar10", "cifar10_fast"))
        for what, make in (("classification", run_classification), ("ood", run_ood), ("attacks", run_attacks))
    },
    **{
        f"{make.__name__}-{preset}": partial(make, preset)
        for make, presets in ((benchmark, ("cpu", "gpu")), (profile, ("cpu", "gpu")), (levers, ("cpu", "gpu")),
                              (growth, ("cpu",)), (parts, ("cpu",)))
        for preset in presets
    },
}  # fmt: skip

if __name__ == "__main__":
    main()
