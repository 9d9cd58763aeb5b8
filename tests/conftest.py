"""Tiny models and texts, shared by the test modules."""

import io
import json
import os
import signal
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from texts import chapters
from transformers import TrainerCallback

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.text.demo_corpus import train_tokenizer
from factorized_gpt2.text.tokenizers import load_tokenizer
from factorized_gpt2.trainer.trainer import FactorizedTrainer

VOCAB_SIZE, WIDTH, RANK = 99, 32, 12
SHAPE = {"vocab_size": VOCAB_SIZE, "n_positions": 48, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
# Special tokens inside the tiny vocabulary; no end of sequence, so that generation always runs to its length.
TOKENS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

VARIANTS = {
    "tied": {"n_embd_wte": RANK},
    "untied": {"n_embd_wte": RANK, "tie_word_embeddings": False},
    "unfactorized": {"n_embd_wte": None},
}


class Terminal(io.StringIO):
    """A stream that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def tiny_config(**overrides) -> FactorizedGPT2Config:
    """Make a configuration small enough for a test: tied, rank 12 of width 32, no dropout."""
    return FactorizedGPT2Config(**(SHAPE | TOKENS | NO_DROPOUT | {"n_embd_wte": RANK} | overrides))


def checkpoint_activations(model, **options) -> None:
    """Compute activations anew on the way back, by whichever name the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


@torch.no_grad()
def perturb(model, seed: int = 5):
    """Move every weight far from where initialisation puts it, so that initialising again cannot go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 2 else 0.1
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_model(seed: int = 5, **overrides) -> FactorizedGPT2:
    """Make a tiny language model in evaluation mode, with weights that depend on nothing but the seed."""
    torch.manual_seed(seed)
    return perturb(FactorizedGPT2(tiny_config(**overrides)), seed).eval()


def random_ids(batch: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Draw token ids, none of them a special token."""
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], pad_token_id: int = 1) -> dict[str, torch.Tensor]:
    """Batch rows of unequal length the way `generate` wants them: padding first."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def cut_off_at(step: int):
    """Let training end after `step` as by Ctrl-C."""

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    start = FactorizedTrainer.__init__

    def start_with_cut(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.add_callback(Cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorizedTrainer, "__init__", start_with_cut)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Take Ctrl-C as at a keyboard, where whoever started the tests in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=VARIANTS)
def variant(request) -> dict:
    return VARIANTS[request.param]


@pytest.fixture
def model(variant) -> FactorizedGPT2:
    return tiny_model(**variant)


@pytest.fixture
def ids() -> torch.Tensor:
    return random_ids()


@pytest.fixture(scope="session", autouse=True)
def _own_datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("datasets"):  # some tests do without
            import datasets

            patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


DOCUMENTS = chapters(8)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Make a folder with `tokenizer/`, `train.jsonl` and `validation.jsonl`."""
    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(DOCUMENTS, 300).save_pretrained(folder / "tokenizer")
    for name, texts in (("train", DOCUMENTS[8:]), ("validation", DOCUMENTS[:8])):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return load_tokenizer(str(corpus / "tokenizer"))


# A pixel and a drawing of nothing, for tests in which pictures are made but not looked at.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550"
    "000000a4944415478da6360000000020001e527defc0000000049454e44ae426082"
)


@pytest.fixture
def drawn_pictures() -> None:
    """Let pictures be drawn, for a test that looks at them."""


@pytest.fixture(autouse=True)
def _quick_pictures(request, monkeypatch) -> None:
    """Save empty pictures, which takes no second each, where no test looks at them."""
    looks = "drawn_pictures" in request.fixturenames or request.path.parent.name in ("report", "slow")
    if looks or find_spec("matplotlib") is None:
        return

    def save(figure, path, **options) -> None:
        Path(path).write_bytes(b"<svg/>" if "metadata" in options else _PIXEL)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


# Files whose tests take longest begin, so that no worker is left with one of them at the end.
_LONG = (
    "test_first_answer",
    "test_installed",
    "test_commands",
    "test_secrets",
    "test_security",
    "test_grid",
    "test_bad_input",
)


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.path.stem not in _LONG)
