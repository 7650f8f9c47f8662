"""What is shipped: the metadata, the pictures, the promises of the README."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

import saccade
from saccade import cli

ROOT = Path(__file__).parents[1]
HOUSE = Path(saccade.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_dependency_is_bounded_above() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement


def test_dependencies_are_those_that_are_imported() -> None:
    """Counted: what the package imports is declared, and what is declared is imported; extras inside functions."""
    names = {"pillow": "PIL", "pyyaml": "yaml"}
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [name for extra, some in extras.items() if extra != "dev" for name in some]
    core, lazy = (
        {names.get(name, name) for name in (re.split(r"[><=]", one)[0] for one in some)}
        for some in (PROJECT["project"]["dependencies"], optional)
    )
    text = "\n".join(path.read_text(encoding="utf-8") for path in HOUSE.rglob("*.py"))
    brought = {"google": "onnx", "onnx_ir": "onnxscript"}  # by these, whose own they are
    imported = {brought.get(name, name) for name in re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)}
    assert imported - set(sys.stdlib_module_names) - {"saccade"} == core | lazy
    assert not lazy & set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))


def test_the_licence_is_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_the_pictures_are_shipped_with_their_terms() -> None:
    folder = HOUSE / "pictures"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 100_000 < size < 10_000_000
    terms = [path for path in folder.rglob("*") if path.suffix in {".md", ".txt"}]
    assert terms, "origin and licence stand beside the pictures"
    assert re.search(
        r"licen[cs]e|public domain|CC0", "\n".join(path.read_text(encoding="utf-8") for path in terms), re.I
    )


def test_the_readme_opens_with_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line
    ]
    assert commands[:2] == ["pip install . && saccade tour", "pip install '.[dev]' && pytest"]
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["README.md", "docs/tour.md", "docs/adapt.md"])
def test_commands_in_the_documents_are_understood(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every `saccade …` line is read as the command line reads it; nothing is run."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("epochs: 3\n")
    quiet = {verb: dataclasses.replace(entry, call=lambda values: {}, show=None) for verb, entry in cli.VERBS.items()}
    monkeypatch.setattr(cli, "VERBS", quiet)
    page = importlib.import_module("saccade.adapt")  # which looks at the start to know whose flags to read
    monkeypatch.setattr(page, "natural", lambda start: "dinov2")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line[line.index("saccade ") :] for line in lines if re.search(r"(^|&& |-m )saccade ", line)]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        assert cli.main(words) == 0, command


@pytest.mark.slow  # builds a wheel in an isolated environment: needs the registry, and half a minute
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    wanted = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert wanted <= shipped
    assert not [name for name in shipped if name.startswith(("tests", "docs"))]


def test_the_installed_metadata_agree() -> None:
    try:
        installed = metadata("saccade")
    except ModuleNotFoundError:
        pytest.skip("saccade is on the path, not installed")
    assert installed["Version"] == saccade.__version__
    assert {re.split(r"[><= ;]", name)[0] for name in requires("saccade") or [] if "extra" not in name} == {
        re.split(r"[><=]", name)[0] for name in PROJECT["project"]["dependencies"]
    }
