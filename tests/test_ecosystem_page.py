"""Every row of docs/ecosystem.md is backed by a test that exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "ecosystem.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Pythons")[0]


def test_every_row_names_a_test_that_exists():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][2:]
    named = re.findall(r"`(test_\w+): (test_\w+)` \|$", TABLE, re.MULTILINE)
    assert len(named) == len(rows) >= 40
    for module, name in named:
        tree = ast.parse(next(TESTS.rglob(f"{module}.py")).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (module, name)


def test_versions_are_those_that_are_installed_for_the_tests():
    pins = (TESTS.parent / "constraints.txt").read_text(encoding="utf-8")
    for package, version in re.findall(r"(onnx|onnxruntime|trl) (\d+\.\d+\.\d+)", TABLE):
        assert f"{package}=={version}" in pins
    for package, version in re.findall(r"(torch|transformers|huggingface_hub) (\d+\.\d+\.\d+)", TABLE):
        assert f"{package}=={version}" in pins
