"""The package as a wheel: installed alone, in a folder that is no checkout, its commands find all they need."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from factorized_gpt2.settings.command_names import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]

# Runs in one process, since each would need ten seconds to import the libraries: every console command's entry point
# with `--help`, then what reads the shipped configs. Prints a JSON object of what was seen.
EVERY_COMMAND = """
import contextlib, importlib.metadata, io, json, sys
import factorized_gpt2
from factorized_gpt2.settings.parsing import load_config

def call(entry, *words):
    sys.argv = [entry.name, *words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            entry.load()()
        except SystemExit as ended:
            return ended.code, printed.getvalue()

distribution = next(iter(importlib.metadata.distributions(name="factorized-gpt2", path=[sys.argv[1]])))
entries = {entry.name: entry for entry in distribution.entry_points if entry.group == "console_scripts"}
seen = {"package": factorized_gpt2.__file__, "demo": load_config("demo/pca_lora_k8.json")}
seen["help"] = {name: call(entry, "--help") for name, entry in entries.items()}
seen["train"] = call(entries["factorized-gpt2-train"], "--config", "pca_lora_k64.json", "--print_config")
seen["experiments"] = call(
    entries["factorized-gpt2-experiments"],
    *("--dry_run", "--accelerate_config", "configs/accelerate/two_gpus.yaml"),
)
print(json.dumps(seen))
"""


def built(kind: str, folder: Path) -> Path:
    """Build a wheel of the checkout, as it is or editable, by its own build backend, and unpack it."""
    source, wheels, place = folder / "source", folder / "wheels", folder / "installed"
    for name in ("factorized_gpt2", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    wheels.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(wheels)!r})"
    finished = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(place)
    return place


# How a process comes to see the package in the folder that its first word names, and no other that is installed.
ALONE = """
import os, site, sys
place = sys.argv[1]
sys.path[:] = [path for path in sys.path if not os.path.exists(os.path.join(path, "factorized_gpt2", "__init__.py"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, place)
site.addsitedir(place)
"""


def run(code: str, place: Path, cwd: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", ALONE + code, str(place)]
    finished = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    place = built("wheel", folder)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    seen = run(EVERY_COMMAND, place, elsewhere)
    assert not list(elsewhere.iterdir())
    assert Path(seen["package"]).is_relative_to(place)
    return seen


def test_every_command_shows_its_page_under_its_own_name(seen):
    assert set(seen["help"]) == {command.installed for command in COMMANDS}
    for name, (code, page) in seen["help"].items():
        assert code == 0
        assert f"usage: {name} " in page
        assert not any(command.script in page for command in COMMANDS if command.script.endswith(".py"))


def test_shipped_configs_are_found_by_name_with_what_they_extend(seen):
    code, printed = seen["train"]
    config = json.loads(printed[printed.index("{") :])
    assert code == 0
    assert (config["n_embd_wte"], config["lora_rank"], config["block_size"]) == (64, 32, 2048)
    assert seen["demo"]["lora_rank"] == 16


def test_the_grid_and_the_launchers_configs_are_found(seen):
    code, printed = seen["experiments"]
    assert code == 0
    assert printed.count("not begun") == 13


def test_an_editable_install_reads_the_configs_of_its_checkout(tmp_path):
    place = built("editable", tmp_path)
    code = "import json; from factorized_gpt2.settings import find_config as find"
    code += "; print(json.dumps(str(find('baseline'))))"
    assert run(code, place, place) == str(tmp_path / "source/configs/baseline.json")


def test_every_package_is_in_the_wheel():
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    listed = set(setup["options"]["packages"].split())
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "factorized_gpt2").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"factorized_gpt2.configs"} == listed


def test_no_script_hides_a_package_that_people_import():
    hidden = {"evaluate", "datasets", "transformers", "peft", "accelerate", "trl", "lm_eval"} | sys.stdlib_module_names
    assert not hidden & {path.stem for path in REPOSITORY.glob("*.py")}


def test_every_folder_of_code_is_packaged():
    settings = ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    packaged = set(settings["options"]["packages"].split()) - {"factorized_gpt2.configs"}
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "factorized_gpt2").rglob("*.py")}
    assert packaged == {".".join(folder.parts) for folder in folders}
