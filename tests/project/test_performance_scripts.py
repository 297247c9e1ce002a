"""The scripts that measure speed: what they measure is our step, and what fails is left out and says why."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import scripts
import tiny

from jem_jax.distributed import processes
from jem_jax.training import network

ROOT = Path(__file__).parents[2]
LOGITS = [[0.1, -0.2], [0.3, 0.05]]


class FakeWorker:
    """Answers at once. What `broken` says of a script, or of a style of PyTorch's, does not work."""

    broken: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, script, environment=None, patience=None):
        self.name = self.script = script
        self.flags = (environment or {}).get("XLA_FLAGS", "")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, function, **arguments):
        self.name = arguments.get("style", self.name)
        wrong = self.broken.get(self.name, self.broken.get(self.flags or "none", ""))
        if wrong == function:
            raise RuntimeError("Traceback\nMemoryError: out of memory | all of it")
        answers = {
            "start": "jax", "iterations": 0.5, "chains": 0.25, "losses": 0.1, "dispatch": 0.01, "products": 1e12,
            "memory": {"bytes": 2**20, "what": "all"}, "layouts": {"b01f": 3},
            "communication": {"all_reduces": 1, "bytes": 40, "parameters": 9},
            "prepare": {"flops": 1e9, "compile_seconds": 2.0, "logits": LOGITS},
            "build": {"flops": 1e9, "logits": LOGITS}, "compiled": {"compile_seconds": 2.0},
        }  # fmt: skip
        if function == "prepare" and wrong == "logits":
            return {"logits": [[9.0, 9.0], [9.0, 9.0]]}
        return answers[function]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that runs a script's main with fake workers, and gives its status and what it stored."""
    for module in ("runs", "make_tables"):
        monkeypatch.setattr(scripts.load(module), "RESULTS", tmp_path)

    def run(script, *arguments, broken=None, worker=FakeWorker):
        module = scripts.load(script)
        monkeypatch.setattr(module, "Worker", worker)
        monkeypatch.setattr(module, "ROOT", tmp_path, raising=False)
        monkeypatch.setattr(module, "IMAGES", tmp_path, raising=False)
        monkeypatch.setattr(FakeWorker, "broken", broken or {})
        monkeypatch.setattr("sys.argv", [script, *arguments])
        return module.main(), {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    return run


def test_a_benchmark_keeps_every_case_and_compares_with_each_official_style(measured, monkeypatch):
    monkeypatch.setattr(scripts.load("benchmark"), "profile", lambda worker, name: {"of": name})
    status, stored = measured("benchmark", "--preset=gpu", "--rounds=2", "--profile")
    assert status == 0
    first, second = stored["benchmark_gpu"]["summary"]["cases"][:2]
    assert first["programs"][0]["program"] == "jem_jax bfloat16"
    assert [program.get("profile") for program in first["programs"]] == [{"of": "jem_jax bfloat16"}] + 4 * [None]
    assert len(first["programs"]) == 5
    # What takes minutes to compile is tried once.
    assert len(second["programs"]) == 4
    assert first["programs"][0]["iteration_seconds"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert first["programs"][0]["chain_steps_per_second"]["median"] == 20 / 0.25
    assert first["programs"][0]["compile_seconds"] == first["programs"][0]["cached_compile_seconds"] == 2
    text = scripts.load("make_tables").benchmark("gpu")
    assert "| jem_jax bfloat16 | 2 (2 to 2) | 1.00 / 1.00 |" in text


def test_programs_that_fail_or_compute_something_else_are_left_out_and_named(measured, capsys):
    broken = {"tuned": "iterations", "tuned, compiled": "logits"}
    status, stored = measured("benchmark", "--preset=cpu", "--rounds=2", broken=broken)
    assert status == 1
    case = stored["benchmark_cpu"]["summary"]["cases"][0]
    assert [program["program"] for program in case["programs"]] == ["jem_jax", "PyTorch, official style"]
    assert case["failed"]["PyTorch, tuned, compiled"].startswith("its logits differ by")
    assert "PyTorch, tuned failed: Traceback" in capsys.readouterr().out
    text = scripts.load("make_tables").benchmark("cpu")
    assert "| PyTorch, tuned | failed: MemoryError: out of memory / all of it |" in text


def test_a_benchmark_that_is_cut_off_keeps_the_cases_before(measured, tmp_path):
    class Cut(FakeWorker):
        def ask(self, function, **arguments):
            if arguments.get("batch") == 256:
                raise KeyboardInterrupt
            return super().ask(function, **arguments)

    with pytest.raises(KeyboardInterrupt):
        measured("benchmark", "--preset=gpu", "--rounds=1", worker=Cut)
    assert len(json.loads((tmp_path / "benchmark_gpu.json").read_text())["summary"]["cases"]) == 2


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    idle = tmp_path / "idle"
    idle.write_text("#!/bin/sh\nexec sleep 60\n")
    idle.chmod(0o700)
    with (
        scripts.load("workers").Worker("torch_worker.py", python=idle, patience=0.1) as worker,
        pytest.raises(RuntimeError, match="ended"),
    ):
        worker.ask("products")


@pytest.mark.parametrize("preset", ["gpu", "gpu_rest"])
def test_levers_and_their_failures_are_in_the_table(measured, monkeypatch, preset):
    # As many cores as let programs compile side by side.
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    measured("levers", f"--preset={preset}", broken={"--xla_gpu_autotune_level=0": "prepare"})
    text = scripts.load("make_tables").levers(preset)
    subjects = scripts.load("levers")._subjects(preset)
    assert len(text.splitlines()) == 2 + sum(len(subject.levers) for subject in subjects) + 2
    count = sum(lever.name == "huge pages" for subject in subjects for lever in subject.levers)
    assert len(re.findall(r"\| huge pages \| no \| .* \| 500 \| 500 \| 1.00 \|", text)) == count
    assert ("failed: MemoryError: out of memory / all of it" in text) == (preset == "gpu_rest")


def test_scaling_is_stored_and_drawn(measured, tmp_path):
    _, stored = measured("scaling", "--preset=tiny")
    points = stored["scaling_tiny"]["summary"]["points"]
    assert points["steps"][0]["expected_seconds"] == points["steps"][0]["seconds"] == 0.5
    assert (tmp_path / "scaling_tiny.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckcrs_nhwc", "convolutions"),
        ("void cudnn::nchwToNhwcKernel<float>", "changes of layout"),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "matrix products"),
        ("loop_add_fusion_3", "elementwise, reductions and random numbers"),
    ],
)
def test_kernels_have_kinds(name, kind):
    assert scripts.load("profile_step").kind_of(name).startswith(kind)


def test_a_worker_measures_the_step_of_the_command(tmp_path, monkeypatch):
    worker, profile_step = scripts.load("jax_worker"), scripts.load("profile_step")
    monkeypatch.setattr(processes, "start", lambda *_: None)
    worker.start(batch=8, slots=64)
    sampler = {"num_steps": 2, "buffer_size": 64}
    settings = {"model": {"factory": "tiny:mlp"}, "sampler": sampler, "training": {"batch_size": 8}}
    found = worker.prepare({"side": 8, "channels": 1, "classes": 3}, settings)
    assert found["flops"] > 0
    for measure in (worker.iterations, worker.chains, worker.losses, worker.dispatch):
        assert measure(2) > 0
    assert int(worker._state["state"].step) == 1 + 2 + 3
    assert worker.communication()["all_reduces"] == 1
    assert worker.communication()["bytes"] >= 4 * worker.communication()["parameters"]
    assert worker.trace(str(tmp_path), 2) > 0
    calls = list(profile_step._calls(next(tmp_path.rglob("*.xplane.pb"))))
    assert sum(seconds for _, seconds in calls) > 0
    assert "matrix products" in {profile_step.kind_of(name) for name, _ in calls}


def test_passes_apart_are_the_one_pass():
    worker = scripts.load("jax_worker")
    net = network.Network(tiny.mlp(3))
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    variables = net.init(jax.random.key(1), x)
    apart, state = worker._train_logits_apart(net, variables, [x[:4], x[4:]], jax.random.key(2))
    assert state == {}
    assert jnp.allclose(jnp.concatenate(apart), net.logits(variables, x), atol=1e-6)


def test_means_agree_within_the_spread_of_seeds():
    module = scripts.load("bfloat16_agreement")
    # Means of 2 and 4 agree where the larger spread of seeds is 2, not where it is 1.
    for low, high, agrees in ((1.0, 3.0, True), (1.5, 2.5, False)):
        found = module._compared([[{"loss": low}, {"loss": high}], [{"loss": 4.0}, {"loss": 4.0}]], "loss")
        assert (found["difference"], found["spread_of_seeds"], found["agrees"]) == (2.0, high - low, agrees)


@pytest.mark.skipif(not shutil.which("bash"), reason="a bash script")
def test_the_gpu_script_names_its_steps_before_it_takes_any(tmp_path):
    command = ["bash", ROOT / "experiments" / "speed" / "h200.sh", "--dry-run", "profile", "nonsense"]
    ended = subprocess.run(command, env={"OUT": str(tmp_path), "PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "there is no step nonsense; steps are benchmark profile fast" in ended.stderr
    assert not list(tmp_path.glob("*.log"))
