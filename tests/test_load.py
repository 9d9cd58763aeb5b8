"""A sample of `soak/load.py`: memory, threads, the same seed twice; and its bars, which can be missed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "soak"))

import load

SAMPLE = ["--steps", "60", "--calls", "60", "--threads", "4"]
# So short a run still warms up; the activations of a step or the logits of a call are more than this.
WARMING_UP = ["--bytes_a_step", "65536"]


def test_a_sample(capsys):
    load.main([*SAMPLE, *WARMING_UP])
    rows = [line for line in capsys.readouterr().out.splitlines() if "holds" in line]
    assert [row.split("  ")[-1] for row in rows] == [
        "60 steps, scratch: memory in the second half",
        "60 steps, LoRA: memory in the second half",
        "60 generate calls: memory in the second half",
        "4 threads and one: generate, greedy, sampled, by beams",
        "4 threads and one: loss",
        "4 threads and one: loss and gradients in training",
        "two processes: LoRA",
        "two processes: baseline",
        "two processes: compressed, joint",
        "two processes: compressed, pca",
        "two processes: compressed, tokenwise, refined",
        "two processes: sampled text",
        "two processes: scratch",
    ]


def test_memory_that_grows_misses_its_bar(monkeypatch):
    request, kept = load._request, []

    def leak(model, number):
        kept.append(np.ones(20_000))
        return request(model, number)

    monkeypatch.setattr(load, "_request", leak)
    assert not load.generate(20).check("leaky", 65536).holds


def test_threads_that_share_a_generator_miss_their_bar(monkeypatch):
    tiny_model = load.tiny_model
    monkeypatch.setattr(load, "tiny_model", lambda **overrides: tiny_model())  # with dropout
    assert [check.holds for check in load.use_in_threads(2)] == [True, True, False]


def test_a_seed_that_does_nothing_misses_its_bar(monkeypatch):
    def make(command, env, **options):
        Path(command[-1]).write_text(json.dumps({"sound": "a", "by hash": env["PYTHONHASHSEED"]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(load.subprocess, "run", make)
    assert [check.holds for check in load.do_twice()] == [True, False]


def test_what_misses_its_bar_is_named(capsys, monkeypatch):
    monkeypatch.setattr(load, "train", lambda steps, is_lora: memory([0] * 5 + [1000 * n for n in range(5)]))
    monkeypatch.setattr(load, "generate", lambda calls: memory([5000.0] * 10))
    monkeypatch.setattr(load, "use_in_threads", lambda threads: [])
    with pytest.raises(SystemExit) as caught:
        load.main(["--bytes_a_step", "999", "--twice", "False"])
    names = [f"2000 steps, {kind}: memory in the second half" for kind in ("scratch", "LoRA")]
    assert caught.value.code == f"missed: {'; '.join(names)}"
    assert capsys.readouterr().out.count("MISSED") == 2
    load.main(["--bytes_a_step", "1001", "--twice", "False"])


def memory(samples: list[float]) -> load.Memory:
    made = load.Memory()
    made.samples = samples
    return made
