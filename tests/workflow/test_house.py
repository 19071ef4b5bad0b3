"""The house is in order: formatting, lint, one set of pins, a README that names what exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # snakefmt looks for shfmt there


def run(*command, cwd=ROOT):
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("snakefmt", "--check", "Snakefile", "rules"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_formatting_and_lint(command):
    result = run(BIN / command[0], *command[1:])
    assert result.returncode == 0, result.stdout


def test_snakemake_lint(tmp_path):
    result = run(BIN / "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path, "--lint")
    assert result.returncode == 0, result.stdout
    assert "Congratulations" in result.stdout


def test_requirements_are_pinned_and_environment_yml_says_the_same():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in requirements), requirements
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip["pip"] == requirements
    assert "torch==2.13.0" in requirements
    assert not [line for line in requirements if line.startswith("torchvision")]


def test_what_is_installed_is_what_is_pinned():
    from importlib.metadata import version

    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, pin = line.partition("==")
            assert version(name).partition("+")[0] == pin, name


@pytest.mark.xdist_group("house")
def test_tests_of_one_group_run_in_one_process(request):
    """Else each process starts a cluster of its own and runs everything that its tests look at."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@house")


def test_importing_what_the_workflow_needs_imports_no_torch():
    imports = "import sys; sys.path.insert(0, 'scripts'); import qwen_image.check, qwen_image.cache.program"
    code = f"{imports}; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout.strip() == "False"


@pytest.mark.parametrize("program", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_program_says_what_it_is_and_how_to_call_it(program):
    text = (ROOT / "scripts" / program).read_text()
    assert re.search(rf"^ *(python|accelerate launch [^\n]*) ?scripts/{program}", text, re.MULTILINE)
    result = run(sys.executable, ROOT / "scripts" / program, "--help")
    assert result.returncode == 0, result.stdout
    assert "usage:" in result.stdout


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).exists(), name
