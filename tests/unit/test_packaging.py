"""What `pip install .` puts into an environment: every module, and every file beside the modules that is read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / name for name in ("tinker_hpc", "launch", "megatron_adapters", "slurm_templates")]


def test_every_folder_of_the_packages_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in package.rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []
    included = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert set(included) == {f"{package.name}*" for package in PACKAGES}


def test_every_other_file_in_them_is_declared() -> None:
    declared = PYPROJECT["tool"]["setuptools"]["package-data"]
    others = [
        path
        for package in PACKAGES
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    ]
    assert others, "the templates are gone?"
    for path in others:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in declared.get(package, [])), f"{path} is not in the wheel"


def test_what_conda_installs_is_what_pyproject_declares() -> None:
    """environment.yml names torch first and by itself, with the bound that the worker has."""
    worker = PYPROJECT["project"]["optional-dependencies"]["worker"]
    torch = next(requirement for requirement in worker if requirement.startswith("torch"))
    lines = [line.strip("- ") for line in (ROOT / "environment.yml").read_text().splitlines()]
    assert torch in lines and "e .[worker] --config-settings editable_mode=compat" in lines
    assert f"python={PYPROJECT['project']['requires-python'].removeprefix('>=')}" in lines


def test_pins_satisfy_what_is_declared() -> None:
    """requirements.txt, which the tests run with, has a pin for everything declared, and one that is allowed."""
    from packaging.requirements import Requirement

    pins = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    )
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["worker"], *extras["dev"]]:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name == "torch":  # installed by itself, before the others: Makefile
            continue
        assert name in pins, f"{name} is declared in pyproject.toml and not pinned"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is pinned, declared is {requirement}"


def test_every_editable_install_named_is_one_by_path() -> None:
    """setuptools' other kind is found after a folder `tinker_hpc` in the working directory, an empty namespace package
    to Python: what a user has who clones to /scratch and keeps a loop beside the clone."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile", ROOT / "environment.yml"]
    installs = [
        (page.name, line)
        for page in pages
        for line in page.read_text().splitlines()
        if re.search(r"(pip.* install .*|- )-e \S*\.", line)
    ]
    assert len(installs) >= 5
    assert [found for found in installs if "--config-settings editable_mode=compat" not in found[1]] == []
