"""Run transformers' own common model tests against this package's model.

The tests come from the source archive of the installed transformers (network needed, once a run), or from an archive
that is unpacked already: `python tests/conformance/run.py --source transformers-X.Y.Z [pytest options]`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# The archive leaves these packages out, and test_modeling_common imports one name of each.
STAND_INS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def download_source(folder: Path) -> Path:
    """Download and unpack the source archive of the installed transformers."""
    requirement = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
    subprocess.run([*pip, requirement], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def lay_out_tests(source: Path, package: Path) -> None:
    """Make an importable package of the archive's tests, with stand-ins for what it lacks."""
    package.mkdir()
    for entry in (source / "tests").iterdir():
        (package / entry.name).symlink_to(entry.resolve())
    for name, content in STAND_INS.items():
        stand_in = package / name
        if not stand_in.exists():
            stand_in.parent.mkdir(exist_ok=True)
            (stand_in.parent / "__init__.py").touch()
            stand_in.write_text(content)
    (package / "__init__.py").touch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="an unpacked source archive of transformers")
    arguments, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = arguments.source or download_source(folder)
        lay_out_tests(source, folder / "transformers_tests")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "RUN_TRAINING_TESTS": "1",
        }
        suite = HERE / "common_model_tests.py"
        # The suite has marks of its own, which this project's strict options would refuse.
        settings = ["-p", "no:cacheprovider", "-o", "addopts=-q", "-W", "ignore"]
        command = [sys.executable, "-m", "pytest", *settings, str(suite), *pytest_options]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
