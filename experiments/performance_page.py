"""The page of performance, docs/performance.md, from stored results.

    python experiments/performance_page.py

Reads experiments/results/benchmark_*.json, scaling_*.json, levers_*.json, profile_*.json, gpu_program.json,
watch_cost.json, jax_versions.json and bfloat16_agreement.json as far as they are there; what is not there is listed as
not measured.
Runs in a second.
"""

import json
import re
import statistics
from collections.abc import Mapping
from typing import Any

from runs import RESULTS, ROOT
from tables import table

PAGE = ROOT / "docs" / "performance.md"
PRESETS = ("cpu", "gpu")
MOST_KERNELS = 12
Numbers = Mapping[str, Any]

# Work of one WRN-28-10 iteration, batch 64, K 20, and what devices exchange in it.
ITERATION_FLOPS = 37.3e12
PARAMETERS = 36_471_338
LINKS = (
    ("H200, NVLink within 8", 790e12, 450e9, (8,), "NVIDIA H200 data sheet: 900 GB/s both ways together"),
    ("H200, InfiniBand NDR", 790e12, 50e9, (64, 512), "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port, one a GPU"),
    ("TPU v5p, ICI", 459e12, 300e9, (8, 64, 512), "Google Cloud TPU v5p documentation: 4,800 Gb/s a chip, both ways"),
)

# ruff: noqa: E501 (rows of a table)
LEVERS = """\
| lever | predicted | measured |
| --- | --- | --- |
{measured}| XLA's YNN convolution fusion off (CPU, two devices) | 1.6 times on one device | level, on a busy machine; no raw result kept; not set |
| kernel gradient as nine shifted products (CPU) | up to 2 times | three to eight times slower at every size tried; no raw result kept; not used |
| kernel gradient as one product over patches (CPU) | up to 2 times | two to ten times slower, about level for 64→64 at stride 2; no raw result kept; not used |
| freed memory kept by glibc (one arena, no mmap; CPU) | the page faults, a fifth of an update at 32×32 | that, but every allocation waits in one arena: after a compilation the 8×8 iteration took 52 against 38 ms; no raw result kept; not set |
| input gradient without weight gradients | a third of a chain step | in the lowered GPU program (tests/test_gpu_program.py); time not measured |
| donated buffer, held as rows [S, D]; resident data | no copy of the buffer, no transfer | in the compiled CPU program nothing but the scatter touches the buffer (tests/test_train_step.py); as [S, C, H, W, 1] it was copied twice, 91 against 24 ms with a million slots of 8×8; no raw result kept of that |
| several iterations in one dispatch (GPU) | the host's part of an iteration where it is not hidden | not built: calls of the step are queued while the GPU works, and a loop over iterations would have to launch the same 1,800 (cifar10_fast.py) to 3,800 kernels one by one, since convolutions do not go into CUDA graphs (above) |
"""

MEASURED_LEVERS = {
    "cpu": {
        "input gradient as a convolution": ("input gradient written as a forward convolution (CPU)", "13 to 36 times a convolution in the chain"),
        "matrix products": ("3×3 convolutions with up to 4 pixels of output as a matrix product (CPU)", "15 times such a convolution"),
        "parts of a batch": ("8,192 pixels of images at a time: what a core's cache holds (CPU)", "what the cache misses of larger parts cost"),
        "a device for each core": ("two host devices, one a core (CPU)", "1.2 to 2 times"),
        "huge pages": ("**not a default**, since a process must be started with it: `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, memory in huge pages (CPU, Linux)", "the page faults, a fifth of an update at 32×32"),
    },
    "gpu": {
        "cast once": ("kernels cast to bfloat16 and laid out once, before the chain; XLA leaves that in the loop (GPU)", "56 of 172 kernels of a WRN-28-10 chain step, 5 to 8 % of an iteration"),
        "one pass": ("one pass for all batches of the loss (GPU)", "fewer launches, fuller kernels: up to a tenth of the loss"),
        "autotuning": ("autotuning of convolutions and matrix products, XLA's default (GPU)", "1.2 to 2 times"),
        "graphs": ("CUDA graphs of what is no convolution, XLA's default (GPU)", "launches: much of an 8×8 iteration, nothing of WRN-28-10's"),
        "convolutions and loop in graphs": ("**not a default**: convolutions and the chain's loop in CUDA graphs too, `XLA_FLAGS=--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE` (GPU)", "launches: up to half of an iteration of cifar10_fast.py"),
        "fused convolutions": ("**not a default**: `XLA_FLAGS=--xla_gpu_experimental_enable_conv_fusion=true` (GPU)", "some of the elementwise kernels"),
        "eight elements a thread": ("**not a default**: `XLA_FLAGS=--xla_gpu_experimental_allow_unroll_factor_eight=true` (GPU)", "a part of the elementwise kernels"),
        "batches of twice the size": ("**not a default**: batches of twice the size, where launches are what takes time (GPU)", "twice the images in 1.2 to 1.5 times the time"),
        "unrolled": ("**not a default**: `sampler.unroll=5` (GPU)", "some launches; slower on a CPU"),
        "NHWC": ("**not a default**: all convolutions NHWC, `XLA_FLAGS=--xla_gpu_force_conv_nhwc=true` (GPU)", "nothing: what XLA chooses in bfloat16"),
        "NCHW": ("**not a default**: all convolutions NCHW, `XLA_FLAGS=--xla_gpu_force_conv_nchw=true` (GPU)", "slower, by the transposes"),
    },
}  # fmt: skip
"""By preset, and by their names in levers.py: what they are, and what they were predicted to give"""
NO_DEFAULT = (
    "huge pages", "convolutions and loop in graphs", "fused convolutions", "eight elements a thread",
    "batches of twice the size", "unrolled", "NHWC", "NCHW",
)  # fmt: skip

UNMEASURED = {
    "gpu": "on a GPU: other sizes than those below, how cost grows, and the levers that say so. `experiments/h200.sh` "
    "measures them",
    "cpu": "the benchmark and the growth of the cost on a quiet CPU machine",
}


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


def page() -> str:
    """docs/performance.md."""
    benchmarks = {preset: found for preset in PRESETS if (found := _read(f"benchmark_{preset}"))}
    growths = {preset: found for preset in PRESETS if (found := _read(f"scaling_{preset}"))}
    agreement = _read("bfloat16_agreement")
    parts = [
        "# Performance\n\nMade by `python experiments/performance_page.py` from the raw results in "
        "[experiments/results](../experiments/results); the model of several chips apart, nothing here is an estimate.",
        _not_measured(benchmarks, growths),
        *(_benchmark(preset, found) for preset, found in benchmarks.items()),
        *(_growth(preset, found) for preset, found in growths.items()),
        _agreement(agreement),
        *(_profile(found) for preset in PRESETS if (found := _profiles(preset, benchmarks))),
        _gpu_program(_read("gpu_program")),
        _levers({preset: _levers_of(preset) for preset in MEASURED_LEVERS}, agreement),
        _versions(_read("jax_versions")),
        _watch(_read("watch_cost")),
        _several_chips(),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _read(name: str) -> Numbers | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _not_measured(*found: Mapping[str, Numbers]) -> str:
    missing = [text for preset, text in UNMEASURED.items() if not all(preset in some for some in found)]
    lines = [f"- {text};" for text in missing]
    lines.append("- several accelerators: checked on virtual CPU devices only.")
    return "**Not measured yet**\n\n" + "\n".join(lines)


def _benchmark(preset: str, found: Numbers) -> str:
    summary = found["summary"]
    rates = ", ".join(f"{rate / 1e12:,.3g} TFLOP/s in {dtype}" for dtype, rate in summary["products_flops"].items())
    text = (
        f"## Training beside PyTorch, {preset.upper()}\n\n`{found['command']}`, {_machine(found)}. "
        "Every program in a process of its own, in turn, from the same weights, whose logits were compared; medians of "
        "rounds, each after an iteration that is not counted, in brackets the least and the greatest. An iteration is whole: chain, loss, update, "
        "buffer, with a separate labelled batch. TFLOP/s count the arithmetic of the algorithm alone, the same for all; "
        f"the share is of the machine's matrix products, measured in the same run: {rates}.\n"
    )
    return text + "\n".join(_case(case) for case in summary["cases"]) + _forecast(summary.get("forecast"))


def _machine(found: Numbers) -> str:
    host = f"{found['cores']} cores, {found['cpu']}"
    return f"{found['device']}, {host}" if "device" in found else host


def _case(case: Numbers) -> str:
    rows = []
    official = {
        program["program"].replace("PyTorch, ", "times "): program["iteration_seconds"]["median"]
        for program in case["programs"]
        if "official" in program["program"]
    }
    for program in case["programs"]:
        seconds = program["iteration_seconds"]
        compiles = [program.get(name) for name in ("compile_seconds", "cached_compile_seconds")]
        rows.append(
            (
                program["program"],
                f"{1 / seconds['median']:.3g} ({1 / seconds['high']:.3g} to {1 / seconds['low']:.3g})",
                *(f"{other / seconds['median']:.2f}" for other in official.values()),
                f"{program['chain_steps_per_second']['median']:,.4g}",
                f"{program['flops_per_second'] / 1e12:.3g} ({program['share_of_products']:.0%})",
                f"{program['memory']['bytes'] / 2**20:,.0f}",
                *("" if value is None else f"{value:.1f}" for value in compiles),
            )
        )
    heads = (
        "program",
        "iterations/s",
        *official,
        "chain steps/s",
        "TFLOP/s (share)",
        "peak MiB",
        "first step cold, s",
        "with cache, s",
    )
    what = "; ".join(sorted({program["memory"]["what"] for program in case["programs"]}))
    failed = [f"\n{name} failed: {_first_line(reason)}\n" for name, reason in case.get("failed", {}).items()]
    return f"\n### {case['case']}\n\n{table(heads, rows)}\n\nMemory: {what}.\n{''.join(failed)}"


def _forecast(found: Numbers | None) -> str:
    if found is None:
        return ""
    return (
        f"\nThe start-up line of `configs/digits.py` announced {found['announced_seconds']:.0f} s; training took "
        f"{found['training_seconds']:.0f} s: {found['ratio']:.2f} times.\n"
    )


def _growth(preset: str, found: Numbers) -> str:
    summary = found["summary"]
    rows = [
        (
            axis,
            f"{point['value']:,}",
            f"{1 / point['seconds']:.3g} ({1 / point['high']:.3g} to {1 / point['low']:.3g})",
            f"{1 / point['expected_seconds']:.3g}",
        )
        for axis, points in summary["points"].items()
        for point in points
    ]
    parts, shared = summary["parts"], summary["communication"]
    iteration, chain, loss = (parts[name] for name in ("iterations", "chains", "losses"))
    return (
        f"## How cost grows, {preset.upper()}\n\n`{found['command']}`, {found['cores']} cores. Base: {summary['base']}, "
        f"buffer 10,000. Expected: time goes with arithmetic, and the buffer's size costs nothing.\n\n"
        f"![Iterations a second over each size](images/scaling_{preset}.png)\n\n"
        f"{table(('size', 'value', 'iterations/s', 'expected'), rows)}\n\n"
        f"Where an iteration's time goes (the base with K 20): {1e3 * iteration:.1f} ms, of which the chain "
        f"{1e3 * chain:.1f} ms, the loss and its gradients {1e3 * loss:.1f} ms, each measured alone, and the rest "
        f"{1e3 * (iteration - chain - loss):.1f} ms. {_host(preset, parts['dispatch'])}\n\nIn the compiled program devices exchange {shared['bytes']:,} bytes an iteration in "
        f"{shared['all_reduces']} all-reduce: {shared['parameters']:,} gradients and some metrics. The chain exchanges "
        "nothing."
    )


def _host(preset: str, seconds: float) -> str:
    if preset == "cpu":
        return "On a CPU the call of a step returns when it is done."
    return f"The host is free again {1e3 * seconds:.1f} ms after it calls a step."


def _agreement(found: Numbers | None) -> str:
    if found is None:
        return ""
    rows = [
        (
            name,
            f"{value['float32']:.4g}",
            f"{value['bfloat16']:.4g}",
            f"{value['spread_of_seeds']:.2g}",
            "yes" if value["agrees"] else "**no**",
        )
        for name, value in found["summary"].items()
    ]
    heads = ("quantity", "float32", "bfloat16", "spread of seeds", "agrees")
    return (
        f"## bfloat16 against float32\n\n`{found['command']}`, {_machine(found)}: from the same weights and chains, "
        "three seeds of each precision; means over the last 20 iterations, and of all chains that had moved. A quantity "
        "agrees where the precisions' means differ by no more than the seeds do. float32 is as JAX computes it by "
        f"default, which a GPU rounds to TF32 in convolutions.\n\n{table(heads, rows)}"
    )


def _narrow(found: Numbers | None) -> str:
    """What bfloat16 gave, in words."""
    if found is None:
        return "not measured yet"
    slow, fast = (
        statistics.median(run["iteration_seconds"] for run in found["runs"][dtype]) for dtype in ("float32", "bfloat16")
    )
    return (
        f"the iteration {slow / fast:.2f} times with WRN-28-10 32×32×3, batch 64, K 20 ({1e3 * slow:.0f} against "
        f"{1e3 * fast:.1f} ms), each the median of the three trainings above"
    )


def _levers(found: Mapping[str, Numbers | None], agreement: Numbers | None) -> str:
    rows = "".join(
        f"| {lever} | {predicted} | {_effect(name, found[preset])} |\n"
        for preset, levers in MEASURED_LEVERS.items()
        for name, (lever, predicted) in levers.items()
    )
    rows += f"| bfloat16 compute, float32 state: `model.dtype` (GPU; against float32 with TF32) | 2 times | {_narrow(agreement)} |\n"
    sources = [f"`{one['command']}` ({one['cores']} cores{_note(one)})" for one in found.values() if one]
    source = f"Measured by {' and '.join(sources)}, medians of five where nothing else is said.\n\n" if sources else ""
    behind = (
        "Where an iteration is behind PyTorch's at 32×32 on a CPU it is by the gradient of the loss, not by the chain: "
        "XLA's kernel gradients take twice as long as the convolutions, and every call faults its temporary memory in "
        "anew. What was tried against it is among the rows.\n\n"
    )
    return f"## Levers\n\n{source}{behind}{LEVERS.format(measured=rows)}"


def _note(found: Numbers) -> str:
    """What is to be known of a result, if anything."""
    return f"; {found['note']}" if "note" in found else ""


def _levers_of(preset: str) -> Numbers | None:
    """What levers.py stored of a preset, with the rest of it."""
    found, rest = _read(f"levers_{preset}"), _read(f"levers_{preset}_rest")
    if found is None or rest is None:
        return found or rest
    return {**found, "summary": [*found["summary"], *rest["summary"]]}


def _effect(name: str, found: Numbers | None) -> str:
    """What a lever gave, in words."""
    measured = []
    for case in found["summary"] if found else ():
        where = _short(case["case"])
        with_it, without = (name, "all") if name in NO_DEFAULT else ("all", name)
        if name not in (*case["seconds"], *case.get("failed", {})):
            continue
        if name in case.get("failed", {}):
            measured.append(f"failed with {where} ({_first_line(case['failed'][name])})")
            continue
        fast, slow = case["seconds"][with_it]["median"], case["seconds"][without]["median"]
        measured.append(f"{slow / fast:.2f} times with {where} ({1e3 * slow:.3g} against {1e3 * fast:.3g} ms)")
    return f"the iteration {'; '.join(measured)}" if measured else "not measured yet"


def _short(case: str) -> str:
    """WRN-10-1 8×8×1, batch 64, K 20 -> 8×8×1, K 20 of the small network, and others by their names."""
    return re.sub(r"^WRN-10-1 (.*?), batch \d+", r"\1", case)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200].replace("|", "/") if text.strip() else ""


def _profiles(preset: str, benchmarks: Mapping[str, Numbers]) -> Numbers | None:
    """What profile_step.py stored, or what the benchmark did on its way."""
    alone = _read(f"profile_{preset}")
    if alone or preset not in benchmarks:
        return alone
    benchmark = benchmarks[preset]
    found = [
        {
            "case": f"{program['program']}, {case['case']}",
            "flops": case["flops"],
            "products": benchmark["summary"]["products_flops"][program["dtype"]],
            **program["profile"],
        }
        for case in benchmark["summary"]["cases"]
        for program in case["programs"]
        if "profile" in program
    ]
    return {"command": benchmark["command"], "summary": found} if found else None


def _gpu_program(found: Numbers | None) -> str:
    if found is None:
        return ""
    programs = found["summary"]["programs"]
    kinds = list(programs[0]["chain_step"])
    rows = [
        (
            program["case"],
            program["kernels"],
            where,
            sum(program[part].values()),
            *(program[part][kind] for kind in kinds),
        )
        for program in programs
        for part, where in (("chain_step", "a step of the chain"), ("outside", "the rest of an iteration"))
    ]
    layouts = sorted({layout for program in programs for layout in program["layouts"]})
    return (
        f"## What a GPU is given to do\n\n`{found['command']}`, JAX {found['summary']['jax']}: the step as XLA compiles "
        "it for an H200, on a machine without one; counts of kernels, no times. All convolutions are of "
        f"{' and '.join(layouts)}: no change of layout stands in the chain. The donated buffer is "
        f"{programs[0]['donated_bytes'] / 2**20:,.0f} MiB, temporary memory at most "
        f"{max(program['temporary_bytes'] for program in programs) / 2**20:,.0f} MiB.\n\n"
        f"{table(('training', 'kernels', 'where', 'launches', *kinds), rows)}"
    )


def _profile(found: Numbers) -> str:
    heading = f"Where a {'GPU' if '=gpu' in found['command'] else 'CPU'}'s time goes"
    parts = [f"## {heading}\n\n`{found['command']}`; sums over a device's streams, or a CPU's threads."]
    for case in found["summary"]:
        kinds = [
            (kind, f"{1e3 * seconds:.2f}", f"{seconds / case['kernel_seconds']:.0%}")
            for kind, seconds in case["kinds"].items()
        ]
        layouts = ", ".join(f"{count} of {layout}" for layout, count in case.get("layouts", {}).items())
        text = (
            f"{case['case']}: {1e3 * case['iteration_seconds']:.2f} ms an iteration, "
            f"{case['kernel_calls']:,.0f} kernels{f'; convolutions: {layouts}' if layouts else ''}.\n\n"
            f"{table(('kind', 'ms an iteration', 'share'), kinds)}"
        )
        if "flops" in case:
            text += _distance(case)
        if "GPU" in heading:
            most = [
                (f"`{kernel['kernel'][:100]}`", f"{kernel['calls']:.0f}", f"{1e3 * kernel['seconds']:.2f}")
                for kernel in case["kernels"][:MOST_KERNELS]
            ]
            text += f"\n\n{table(('kernel', 'calls', 'ms an iteration'), most)}"
        parts.append(text)
    return "\n\n".join(parts)


def _distance(case: Numbers) -> str:
    """How far an iteration is from the time that its arithmetic takes at the rate of matrix products."""
    convolutions = next(seconds for kind, seconds in case["kinds"].items() if kind.startswith("convolutions"))
    rate = case["flops"] / convolutions
    return (
        f"\n\nAt the rate of matrix products the iteration's arithmetic would take {1e3 * case['flops'] / case['products']:.0f} "
        f"ms. cuDNN's convolutions reach {rate / case['products']:.0%} of that rate (160 and 320 channels do not fill its "
        "tiles of 64 and 128), and what stands between them moves every feature map through memory two to four times. "
        "Kernels overlap, so that their sum is more than the iteration."
    )


def _versions(found: Numbers | None) -> str:
    if found is None:
        return ""
    rows = [
        (
            case["case"],
            version,
            f"{1e3 * parts['iterations']['median']:.1f} ({1e3 * parts['iterations']['low']:.1f} to "
            f"{1e3 * parts['iterations']['high']:.1f})",
            f"{parts['iterations']['median'] / next(iter(case['versions'].values()))['iterations']['median']:.2f}",
            f"{1e3 * parts['chains']['median']:.1f}",
            f"{1e3 * parts['losses']['median']:.1f}",
            f"{parts['compile_seconds']:.1f}",
        )
        for case in found["summary"]
        for version, parts in case["versions"].items()
    ]
    heads = ("case", "version", "iteration, ms", "times the first", "chain, ms", "loss, ms", "first step cold, s")
    return (
        f"## Versions of JAX on a CPU\n\n`{found['command']}`, {found['cores']} cores, {found['cpu']}, Python "
        "interpreters of these versions of JAX, in turn; medians of five rounds, in brackets the least and the greatest. "
        "From 0.11 on XLA's convolutions of small images take longer on a CPU; everything else on this page was "
        f"measured with 0.10.2.\n\n{table(heads, rows)}"
    )


def _watch(found: Numbers | None) -> str:
    if found is None:
        return ""
    summary = found["summary"]
    times, rounds = summary["milliseconds"], summary["ratio_of_rounds"]
    return (
        f"## What watching for divergence costs\n\n`{found['command']}`, {found['cores']} cores: the digits iteration "
        f"took {times['with']:.1f} ms with the watch and {times['without']:.1f} ms without it, medians of five rounds in "
        f"turn; {min(rounds):.2f} to {max(rounds):.2f} times as long in each."
    )


def _several_chips() -> str:
    rows = []
    for name, rate, link, chips, source in LINKS:
        compute = ITERATION_FLOPS / rate
        for count in chips:
            exchange = 2 * (count - 1) / count * 4 * PARAMETERS / link
            rows.append(
                (
                    name,
                    count,
                    f"{1e3 * compute:.0f}",
                    f"{1e3 * exchange:.2f}",
                    f"{compute / (compute + exchange):.1%}",
                    source,
                )
            )
    heads = ("chips", "number", "compute, ms", "all-reduce, ms", "efficiency", "link speed from")
    return (
        "## Several chips: a model on paper, not a measurement\n\n"
        "WRN-28-10, K 20, batch 64 **a chip**. An iteration computes 37.3 TFLOP, here at the full rate of matrix products "
        "(790 TFLOP/s measured on an H200, 459 the published peak of a TPU v5p), which is the worst case for the "
        f"exchange, and exchanges once: {4 * PARAMETERS / 1e6:.0f} MB of float32 gradients in a flat ring, 2(n-1)/n times "
        "those bytes over each chip's link, with nothing overlapped and no latency.\n\n"
        f"{table(heads, rows)}"
    )


if __name__ == "__main__":
    main()
