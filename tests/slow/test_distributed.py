"""Several processes: one process's loss curves, whichever way accelerate was told to spread a run."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_ids

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.network.modeling_factorized_gpt2 import FactorizedGPT2Block
from factorized_gpt2.runs.results import Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.text.loss import LossSum, sum_loss

REPOSITORY = Path(__file__).resolve().parents[2]
ACCELERATE = REPOSITORY / "configs/accelerate"
ON_TWO_CPUS = {"use_cpu": True, "mixed_precision": "no", "num_processes": 2}

SCRATCH = {
    **{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_embd_wte": 4, "block_size": 16, "max_steps": 6, "dropout": 0.0},
    **{"per_device_train_batch_size": 2, "effective_batch_size": 8, "do_train": True, "learning_rate": 1e-2},
    **{"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "report_to": ["none"]},
}
LORA = {"baseline": "baseline", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
SHAPE = ("n_layer", "n_head", "n_embd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """Train a baseline, and runs from it and from scratch in one process; write the same runs' configs for others."""
    root = tmp_path_factory.mktemp("distributed")
    texts = {
        **{"train_file": [str(corpus / "train.jsonl")], "validation_file": [str(corpus / "validation.jsonl")]},
        **{"tokenizer": str(corpus / "tokenizer")},
    }
    kinds = {
        "baseline": SCRATCH | {"n_embd_wte": None},
        "scratch": SCRATCH,
        "lora": {name: value for name, value in SCRATCH.items() if name not in SHAPE} | LORA,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for kind, config in kinds.items():
            for way in ("", "-ddp", "-fsdp", "-machines", "-spoilt"):
                path = root / f"{kind}{way}.json"
                path.write_text(json.dumps(config | texts | {"output_dir": f"{kind}{way}"}))
            run_experiment(parse_run(["--config", str(root / f"{kind}.json")]))
    return root


def launch(folder, accelerate_config: str, *words, **changes) -> subprocess.Popen:
    """Launch under one of our accelerate configs, as far as two CPU processes can follow it."""
    config = yaml.safe_load((ACCELERATE / accelerate_config).read_text()) | ON_TWO_CPUS | changes
    path = folder / f"{config['machine_rank']}-{accelerate_config}"
    path.write_text(yaml.safe_dump({"main_process_port": 0} | config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += [str(REPOSITORY / "tests/run_configs.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def output_of(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return output


def same_curves(folder, kind: str, way: str) -> bool:
    """Compare two processes' run with one's, at every logged step, and its model with what it measured."""
    one, two = (Results.read(folder / name) for name in (kind, f"{kind}-{way}"))
    assert (one.processes, two.processes) == (1, 2)
    assert two.settings["gradient_accumulation_steps"] == one.settings["gradient_accumulation_steps"] / 2 == 2
    assert (two.best_tokens, two.trained_parameters) == (one.best_tokens, one.trained_parameters)
    for name, steps in (("training_curve", [1, 2, 3, 4, 5, 6]), ("validation_curve", [3, 6])):
        curves = [torch.tensor(getattr(results, name)) for results in (one, two)]
        assert curves[1][:, 0].tolist() == steps
        assert curves[1][0, 1] - curves[1][-1, 1] > 0.02  # it learns
        assert (curves[0] - curves[1]).abs().max() < 1e-3
    models = [FactorizedGPT2.from_pretrained(folder / name) for name in (kind, f"{kind}-{way}")]
    ids = random_ids(length=16)
    assert (models[0](ids).logits - models[1](ids).logits).abs().max() < 1e-3
    assert not [path.name for path in (folder / f"{kind}-{way}").glob(".*")]
    return True


def test_two_gpus(folder):
    output = output_of(launch(folder, "two_gpus.yaml", "scratch-ddp.json", "lora-ddp.json"))
    assert output.count("validation loss") == 2  # one process speaks for both, of two runs
    assert same_curves(folder, "scratch", "ddp")
    assert same_curves(folder, "lora", "ddp")


def test_fsdp(folder):
    for _ in ("at once", "gone on with"):
        output_of(launch(folder, "fsdp.yaml", "--shard", "scratch-fsdp.json", "lora-fsdp.json"))
        for kind in ("scratch", "lora"):
            assert same_curves(folder, kind, "fsdp")
            shutil.rmtree(folder / f"{kind}-fsdp/checkpoint-6")
            (folder / f"{kind}-fsdp/results.json").unlink()


def test_two_machines(folder):
    port = free_port()
    machines = [
        launch(folder, "two_machines.yaml", "lora-machines.json", machine_rank=rank, main_process_port=port)
        for rank in (0, 1)
    ]
    assert "".join(map(output_of, machines)).count("validation loss") == 1
    assert same_curves(folder, "lora", "machines")


def test_a_loss_that_is_nan_in_one_process_stops_all(folder):
    """Without a launcher, which would end the other process itself."""
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, told = [], []
    for rank in "01":
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, str(REPOSITORY / "tests/run_configs.py"), "--spoil", "scratch-spoilt.json"]
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2, errors[-3000:]
        told.append("at step 3: the training loss is NaN or infinite. There is no checkpoint." in errors)
    assert told == [True, False]  # the first speaks for all
    assert not list((folder / "scratch-spoilt").glob("checkpoint-*"))
    assert not (folder / "scratch-spoilt/results.json").exists()


def test_the_class_that_fsdp_wraps_is_the_models():
    config = yaml.safe_load((ACCELERATE / "fsdp.yaml").read_text())
    assert config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == FactorizedGPT2Block.__name__


def test_blocks_that_keep_processes_in_step_do_not_count(model):
    blocks = [{"input_ids": row} for row in random_ids(batch=5, length=8)]
    expected = sum_loss(model, blocks[:3], batch_size=2)
    assert expected.tokens == 3 * 7
    for batch_size in (1, 2, 3, 5):
        summed = sum_loss(model, blocks, batch_size, counted=3)
        assert summed.tokens == expected.tokens
        assert summed.nats == pytest.approx(expected.nats, rel=1e-5)
    assert sum_loss(model, blocks, 2, counted=0) == LossSum(0.0, 0)
