"""Tokens: the environment gives them, the Hub's Authorization header gets them, and nothing else ever holds one."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer
from strangers import holding, outcome, tree

from factorized_gpt2.cli.experiments import run_experiments
from factorized_gpt2.cli.train import train

REPOSITORY = Path(__file__).resolve().parents[1]
HUB_TOKEN, WANDB_KEY, GIT_TOKEN = (
    "hf_QmVyeVNlY3JldEh1YlRva2Vu",
    "wb" * 3 + "QmVyeVNlY3JldFdhbmRiS2V5MTIzNDU2Nzg",
    "ghpQmVyeVNlY3JldEdpdFRva2Vu",
)
SECRETS = {"the Hub's": HUB_TOKEN, "W&B's": WANDB_KEY, "git's": GIT_TOKEN}
RUN = {
    **{"block_size": 16, "max_steps": 2, "do_train": True, "per_device_train_batch_size": 2, "disable_tqdm": True},
    **{"save_strategy": "steps", "save_steps": 1, "report_to": ["wandb"], "project": "p"},
}
CONFIGS = {
    "baseline": {"n_layer": 1, "n_head": 2, "n_embd": 16, "run_name": "secretive-baseline"},
    "lora": {"baseline": "models/baseline", "n_embd_wte": 4, "lora_rank": 2, "run_name": "secretive-lora"},
}


@contextmanager
def watched_processes() -> Iterator[set[bytes]]:
    """Collect the command lines of all processes that there are meanwhile, as anyone on the machine can."""
    seen: set[bytes] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def write_configs(folder: Path, corpus: Path) -> None:
    texts = {f"{split}_file": [str(corpus / f"{split}.jsonl")] for split in ("train", "validation")}
    texts["tokenizer"] = str(corpus / "tokenizer")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(RUN | texts | config | {"output_dir": f"models/{name}"}))
    (folder / "grid.json").write_text(json.dumps({"experiments": list(CONFIGS)}))


@pytest.fixture(scope="module")
def traces(tmp_path_factory, corpus):
    """Train, compress and publish by the commands, with tokens in the environment; keep all that this leaves."""
    folder = tmp_path_factory.mktemp("secrets")
    write_configs(folder, corpus)
    # W&B looks at the repository that it is called in.
    for words in (["init", "-q"], ["remote", "add", "origin", f"https://{GIT_TOKEN}:x-oauth-basic@git.example/a/b"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    with HubServer({HUB_TOKEN: "me"}) as hub, watched_processes() as command_lines:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HOME": str(folder)}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPOSITORY)}
        settings |= {"HF_TOKEN": HUB_TOKEN, "WANDB_API_KEY": WANDB_KEY, "WANDB_MODE": "offline"}
        said, publishing = [], ["--push_to_hub", "me/run"]
        for words in (
            ["run_experiments.py", "--grid", "grid.json", "--output_dir", "models", "--", *publishing],
            ["compress.py", "--baseline", "models/baseline", "--ranks", "8", "--push_to_hub", "me/small"],
        ):
            command = [sys.executable, str(REPOSITORY / words[0]), *words[1:]]
            done = subprocess.run(
                command, cwd=folder, env=kept | settings, capture_output=True, stdin=subprocess.DEVNULL, timeout=900
            )
            said.append(done.stdout + done.stderr)
            assert done.returncode == 0, said[-1].decode()[-4000:]
    return SimpleNamespace(folder=folder, hub=hub, said=b"".join(said), command_lines=command_lines)


def test_the_commands_did_what_a_token_is_needed_for(traces):
    assert {"me/run", "me/small"} <= traces.hub.repos.keys()
    assert len(traces.hub.repos["me/run"].log) == 3
    assert list(traces.folder.glob("models/lora/checkpoint-*/training_args.bin"))
    recorded = holding(traces.folder, "secretive-lora")
    assert {".wandb", ".json", ".bin"} <= {path.suffix for path in recorded}  # so they would be found


@pytest.mark.parametrize("whose", SECRETS)
def test_no_file_holds_a_token(traces, whose):
    assert not holding(traces.folder, SECRETS[whose])


@pytest.mark.parametrize("whose", SECRETS)
def test_no_output_holds_a_token(traces, whose):
    assert b"Published" in traces.said
    assert SECRETS[whose].encode() not in traces.said


@pytest.mark.parametrize("whose", SECRETS)
def test_no_request_holds_a_token_but_where_it_belongs(traces, whose):
    assert any(b"commit" in request for request in traces.hub.received)
    assert not [request for request in traces.hub.received if SECRETS[whose].encode() in request]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no list of processes to read")
@pytest.mark.parametrize("whose", SECRETS)
def test_no_process_list_holds_a_token(traces, whose):
    for part in (b"run_experiments.py", b"factorized_gpt2.cli.train", b"factorized_gpt2.cli.compress", b"wandb"):
        assert any(part in line for line in traces.command_lines), part
    assert not [line for line in traces.command_lines if SECRETS[whose].encode() in line]


@pytest.mark.parametrize(
    "words", [["--hub_token", HUB_TOKEN], [f"--hub_token={HUB_TOKEN}"], [f"--hub-token={HUB_TOKEN}"]]
)
def test_a_token_on_the_command_line_is_refused(words, tmp_path, corpus, capsys):
    write_configs(tmp_path, corpus)
    before = tree(tmp_path)
    for command, arguments in (
        (train, ["--config", tmp_path / "baseline.json", "--output_dir", tmp_path / "out", *words]),
        (run_experiments, ["--grid", tmp_path / "grid.json", "--output_dir", tmp_path / "out", "--", *words]),
    ):
        code, line = outcome(command, arguments, capsys)
        assert code == 2
        assert "set HF_TOKEN" in line
        assert HUB_TOKEN not in line
    assert tree(tmp_path) == before


def test_a_token_in_a_config_is_refused(tmp_path, corpus, capsys):
    write_configs(tmp_path, corpus)
    (tmp_path / "with.json").write_text(json.dumps({"extends": "baseline.json", "hub_token": HUB_TOKEN}))
    code, line = outcome(train, ["--config", tmp_path / "with.json"], capsys)
    assert code == 2
    assert "set HF_TOKEN" in line
    assert HUB_TOKEN not in line


def test_the_config_that_is_printed_holds_no_token(tmp_path, corpus, capsys, monkeypatch):
    write_configs(tmp_path, corpus)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    train(["--config", str(tmp_path / "baseline.json"), "--push_to_hub", "--hub_model_id", "me/run", "--print_config"])
    printed = capsys.readouterr().out
    assert json.loads(printed)["push_to_hub"] == "me/run"
    assert HUB_TOKEN not in printed
    assert WANDB_KEY not in printed
    assert "hub_token" not in printed
