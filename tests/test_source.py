"""What no line of the package may do with a stranger's bytes, found by reading the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("factorized_gpt2/**/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
)

NEVER_IMPORTED = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "imp"}
HARMLESS = {"UnpicklingError"}  # a name to catch
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module", "torch.hub.load"),
    *("torch.jit.load", "torch.package.PackageImporter", "np.fromfile", "pd.read_pickle", "sys.addaudithook"),
}
ONLY_WITH = {  # calls that need a keyword, and its value
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoModelForCausalLM.from_pretrained": ("trust_remote_code", False),
}
NEVER_WITH = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def name_of(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def offences(source: str) -> Iterator[str]:
    """Find in a module's source what must not be there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in NEVER_IMPORTED)
        elif isinstance(node, ast.ImportFrom):
            imported = {alias.name for alias in node.names} - HARMLESS
            if (node.module or "").partition(".")[0] in NEVER_IMPORTED and imported:
                yield node.module
        elif isinstance(node, ast.Call):
            called, keywords = name_of(node.func), {word.arg: word.value for word in node.keywords}
            if called in NEVER_CALLED:
                yield called
            keyword, needed = ONLY_WITH.get(called, (None, None))
            if keyword and not is_constant(keywords.get(keyword), needed):
                yield f"{called} without {keyword}={needed}"
            for word, value in keywords.items():
                if word in NEVER_WITH and not is_constant(value, not NEVER_WITH[word]):
                    yield f"{called}({word}={ast.unparse(value)})"


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_runs_or_unpickles_what_it_reads(path):
    assert not list(offences(path.read_text(encoding="utf-8")))


def test_all_of_the_package_was_read():
    assert {"train_hf.py", "loading.py", "compress.py", "checkpoints.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "import yaml as y",
            "from pickle import loads",
            "from joblib import load",
            "import dill._dill",
        ),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "torch.load(x, weights_only=safe)", "np.load(x)"),
        *("np.load(x, allow_pickle=True)", "np.save(x, y)", "eval(x)", "exec(x)", "compile(x, '', 'eval')"),
        *("subprocess.run(x, shell=True)", "f(shell=flag)", "os.system(x)", "__import__(x)", "torch.jit.load(x)"),
        *("AutoConfig.from_pretrained(x)", "AutoTokenizer.from_pretrained(x, trust_remote_code=asked)"),
        *("model.from_pretrained(x, trust_remote_code=True)", "importlib.import_module(x)"),
    ],
)
def test_an_offence_is_found(source):
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        *("from pickle import UnpicklingError", "model.eval()", "re.compile(x)", "torch.load(x, weights_only=True)"),
        *("np.load(x, allow_pickle=False)", "subprocess.run([x])", "module.compile(backend=x)"),
    ],
)
def test_what_is_harmless_is_not(source):
    assert not list(offences(source))
