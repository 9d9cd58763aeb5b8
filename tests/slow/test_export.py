"""Out of this package: graphs of torch.export and ONNX, folders with their code, stock GPT-2, all of one's logits."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import VARIANTS, left_padded, random_ids, tiny_model
from torch import nn

from factorized_gpt2 import to_gpt2
from factorized_gpt2.models.onnx_export import export_onnx

LENGTHS = {"input_ids": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=2, max=48)}}
SHAPES = [(2, 10), (1, 48), (8, 3), (1, 2)]

# Runs where this package cannot be imported, on what a test left in the folder.
ELSEWHERE = """
import json, sys
sys.modules["factorized_gpt2"] = None
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
ids, logits = torch.load("ids.pt"), {}
for name in json.loads(sys.argv[1]):
    for loader in (GPT2LMHeadModel, AutoModelForCausalLM):
        model, loading = loader.from_pretrained(name, output_loading_info=True)
        assert type(model) is GPT2LMHeadModel
        assert not any(loading.values()), loading
        with torch.no_grad():
            logits[f"{name} {loader.__name__}"] = model.eval()(ids).logits
    logits[f"{name} graph"] = torch.export.load(name + ".pt2").module()(ids)
    own = AutoModelForCausalLM.from_pretrained(name + "-own", trust_remote_code=True).eval()
    with torch.no_grad():
        logits[f"{name} own"] = own(ids).logits
torch.save(logits, "logits.pt")
"""


class Logits(nn.Module):
    """What a graph computes: token ids, and where there is padding a mask, to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_close(actual, expected):
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def exported(model) -> torch.export.ExportedProgram:
    return torch.export.export(Logits(model), (random_ids(),), dynamic_shapes=LENGTHS)


def test_a_graph_for_any_batch_and_length(model):
    program = exported(model)
    for shape in SHAPES:
        ids = random_ids(*shape)
        assert_close(program.module()(ids), model(ids).logits)
    storages = {weight.untyped_storage().data_ptr(): weight.numel() for weight in program.state_dict.values()}
    assert sum(storages.values()) == sum(parameter.numel() for parameter in model.parameters())  # ties are kept


def test_a_graph_with_padding(model):
    shapes = LENGTHS | {"attention_mask": LENGTHS["input_ids"]}
    example = (random_ids(), torch.ones(2, 10, dtype=torch.long))
    program = torch.export.export(Logits(model), example, dynamic_shapes=shapes)
    for lengths in ([4, 9], [1, 17, 12]):
        batch = left_padded([random_ids(1, length, seed=length)[0] for length in lengths])
        seen = batch["attention_mask"].bool()
        logits = program.module()(batch["input_ids"], batch["attention_mask"])
        assert_close(logits[seen], model(**batch).logits[seen])


def test_nothing_of_this_package_is_needed(tmp_path):
    """A saved folder, a stock one of `to_gpt2` and a graph, in a process that cannot import this package."""
    ids, expected = random_ids(3, 20), {}
    torch.save(ids, tmp_path / "ids.pt")
    for name, variant in VARIANTS.items():
        model = tiny_model(**variant)
        expected[name] = model(ids).logits
        model.save_pretrained(tmp_path / f"{name}-own")
        to_gpt2(model).save_pretrained(tmp_path / name)
        torch.export.save(exported(model), tmp_path / f"{name}.pt2")
        assert "factorized" not in (tmp_path / name / "config.json").read_text()
    words = [sys.executable, "-c", ELSEWHERE, json.dumps(list(VARIANTS))]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    finished = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    logits = torch.load(tmp_path / "logits.pt")
    assert len(logits) == 4 * len(VARIANTS)
    for name, actual in logits.items():
        assert_close(actual, expected[name.split()[0]])


def test_onnx(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = {"dynamo": True, "verbose": False, "input_names": ["input_ids"], "output_names": ["logits"]}
    path = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (random_ids(),), path, dynamic_shapes=LENGTHS, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        ids = random_ids(*shape)
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        assert_close(torch.from_numpy(logits), model(ids).logits)


def decode(session, batch: dict[str, torch.Tensor], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate greedily with a graph of `export_onnx`; return all tokens, and the logits of every step's last one."""
    ids, mask, new, logits = batch["input_ids"], batch["attention_mask"], batch["input_ids"], []
    shapes = {tensor.name: tensor.shape for tensor in session.get_inputs()[2:]}
    past = {name: np.zeros((len(ids), heads, 0, size), np.float32) for name, (_, heads, _, size) in shapes.items()}
    for _ in range(steps):
        outputs = session.run(None, {"input_ids": new.numpy(), "attention_mask": mask.numpy()} | past)
        past = dict(zip(past, outputs[1:], strict=True))
        logits.append(torch.from_numpy(outputs[0])[:, -1])
        new = logits[-1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids, torch.stack(logits, 1)


def test_onnx_with_a_cache_generates_as_the_model_does(model, tmp_path):
    """One graph for prompts of any number and length, padded or not, and for what follows them token by token."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(model.train(), tmp_path / "model.onnx")
    assert model.training
    model.eval()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    prompts = [random_ids(1, length, seed=length)[0] for length in (4, 9, 1)]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for rows in (prompts, prompts[:1], prompts[2:]):
        batch = left_padded(rows)
        expected = model.generate(**batch, **options)
        ids, logits = decode(session, batch, steps=6)
        assert torch.equal(ids, expected.sequences)
        torch.testing.assert_close(logits, torch.stack(expected.logits, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, model(ids).logits[:, -7:-1], atol=1e-4, rtol=1e-4)  # all at once, no cache
