"""The launch recipes in docs/launch are well-formed and use flags that there are; nobody has run them."""

import re
import subprocess
from pathlib import Path

import yaml

from jem_jax.commands import config_files
from jem_jax.commands.command_line import overrides
from jem_jax.main import _parser

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"
RECIPES = ("tpu_pod.sh", "slurm.sbatch", "kubernetes_jobset.yaml")


def test_the_kubernetes_arguments_are_those_of_the_command_and_its_account_may_ask():
    manifests = yaml.safe_load_all((LAUNCH / "kubernetes_jobset.yaml").read_text())
    parts = {part["kind"]: part for part in manifests}
    [job] = parts["JobSet"]["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    parser = _parser()
    flags, rest = parser.parse_known_args(container["args"])
    config_files.read(flags.config, overrides(parser, rest))
    assert flags.distributed
    assert spec["parallelism"] == spec["completions"]
    assert flags.require_devices == spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    account = parts["ServiceAccount"]["metadata"]["name"]
    assert parts["RoleBinding"]["subjects"][0]["name"] == account
    assert parts["RoleBinding"]["roleRef"]["name"] == parts["Role"]["metadata"]["name"]
    assert spec["template"]["spec"]["serviceAccountName"] == account


def test_recipes_parse_are_one_bare_flag_say_that_nobody_tried_them_and_are_named():
    readme = (LAUNCH / "README.md").read_text()
    assert {path.name for path in LAUNCH.iterdir()} == {"README.md", *RECIPES}
    for name in RECIPES:
        if not name.endswith(".yaml"):
            subprocess.run(["bash", "-n", LAUNCH / name], check=True)
        text = (LAUNCH / name).read_text()
        assert re.search(r"\bUntried\b", text), name
        assert re.search(r"--distributed\b", text), name
        assert "--coordinator_address" not in text, name
        assert f"]({name})" in readme
