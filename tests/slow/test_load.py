"""A sample of `soak/load.py`: memory, threads, the same seed twice; and its bars, which can be missed."""

import json
import mmap
from pathlib import Path
from types import SimpleNamespace

import load
import numpy as np
import pytest
from memory import _MALLINFO, Memory, growth

KINDS = ("resident", "allocated") if _MALLINFO else ("resident",)
SAMPLE = ["--steps", "60", "--calls", "60", "--threads", "4"]
# So short a run still warms up; the activations of a step or the logits of a call are more than this.
WARMING_UP = ["--resident", "65536", "--allocated", "4096"]


def test_a_sample(capsys):
    load.main([*SAMPLE, *WARMING_UP])
    rows = [line for line in capsys.readouterr().out.splitlines() if "holds" in line]
    assert [row.split("  ")[-1] for row in rows] == [
        *(
            f"{what}: {kind} memory, second half"
            for what in ("60 steps, scratch", "60 steps, LoRA", "60 generate calls")
            for kind in KINDS
        ),
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
        pages = mmap.mmap(-1, 1 << 20)  # new to the process, where an array may lie in what it had and gave up
        pages.write(b"x" * len(pages))
        kept.append((pages, np.ones(100_000)))
        return request(model, number)

    monkeypatch.setattr(load, "_request", leak)
    memory = load.generate(20)
    assert min(growth(getattr(memory, kind)) for kind in KINDS) > 100_000


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


def test_warming_up_is_no_growth():
    assert growth([0, 10_000, 20_000, 30_000, 30_000, 30_001, 30_000, 30_001]) == pytest.approx(0.2)
    assert growth([5 * step for step in range(9)]) == pytest.approx(5)


def test_what_misses_its_bar_is_named(capsys, monkeypatch):
    rising, level = Memory(), Memory()
    rising.resident, level.resident = [0] * 5 + [1000 * n for n in range(5)], [5000] * 10
    monkeypatch.setattr(load, "train", lambda steps, is_lora: rising)
    monkeypatch.setattr(load, "generate", lambda calls: level)
    monkeypatch.setattr(load, "use_in_threads", lambda threads: [])
    with pytest.raises(SystemExit) as caught:
        load.main(["--resident", "999", "--twice", "False"])
    names = [f"2000 steps, {kind}: resident memory, second half" for kind in ("scratch", "LoRA")]
    assert caught.value.code == f"missed: {'; '.join(names)}"
    assert capsys.readouterr().out.count("MISSED") == 2
    load.main(["--resident", "1001", "--twice", "False"])
