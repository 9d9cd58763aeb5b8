"""Parts of `gpu.py`: the loss alone, a training step, decoding. What they time is what the other benchmarks time."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import decoding
import scaling
import torch
import training
from bench_run import BenchRun, release_memory
from loss import LossArguments, Problem
from side_by_side import PeakMemory, ratios, seconds_cell, timed

from factorized_gpt2.common.errors import first_line
from factorized_gpt2.network.blockwise_loss import BACKENDS


@dataclass(frozen=True)
class Sizes:
    """How large the problems are.

    Attributes:
        n_layer, width, vocab_size: Of the models.
        ranks: k of the factorized models; the second and third are those that figures are wanted of.
        batch_size, block_size: Of a training step.
        rows: Tokens of the loss alone.
        calls, steps, tokens: Calls, training steps and new tokens of a timed run.
        rounds: Timed runs.
        batches: Texts that are decoded together.
        matrix: Rows and columns of the product that measures the peak.
    """

    n_layer: int
    width: int
    vocab_size: int
    ranks: tuple[int, int, int]
    batch_size: int
    block_size: int
    rows: int
    calls: int
    steps: int
    tokens: int
    rounds: int
    batches: tuple[int, int]
    matrix: int

    @property
    def shape(self) -> dict[str, int]:
        """What the arguments of all benchmarks have in common."""
        return {"n_layer": self.n_layer, "width": self.width, "vocab_size": self.vocab_size}


FULL = Sizes(12, 768, 50257, (64, 256, 512), 4, 2048, 8192, 10, 10, 64, 3, (1, 32), 8192)
SMALL = Sizes(2, 64, 503, (8, 16, 32), 2, 32, 64, 2, 2, 4, 2, (1, 3), 128)


@dataclass(frozen=True)
class Plan:
    """What all parts are told.

    Attributes:
        sizes: Of the problems.
        device: "cuda" or "cpu".
        bundle: Folder with the text of the experiments.
        steps: Of the experiments that train from scratch; `None`: as many as there is time for.
        learning_rate: Factor on theirs.
    """

    sizes: Sizes
    device: str
    bundle: Path
    steps: int | None = None
    learning_rate: float = 1.0

    @property
    def is_small(self) -> bool:
        """Whether this is a rehearsal."""
        return self.sizes is SMALL

    @property
    def compiler(self) -> str:
        """What compiles; on a CPU, where it would take minutes, only what traces."""
        return "inductor" if self.device == "cuda" else "aot_eager"


def loss_alone(bench_run: BenchRun, plan: Plan) -> None:
    """Head and loss in bfloat16, forward and backward: seconds, memory and errors of every backend that runs here."""
    sizes = plan.sizes
    arguments = LossArguments(rows=sizes.rows, vocab_size=sizes.vocab_size, width=sizes.width, device=plan.device)
    for rank, trained in product((*sizes.ranks, sizes.width), (False, True)):
        head = f"k = {rank}, {'trained' if trained else 'frozen'} head"
        if not bench_run.has_time():
            bench_run.leave_out(f"loss, {head}")
            continue
        problem = Problem.make(arguments, rank, "bfloat16", trained)
        exact = problem.exact()
        ways = {
            name: (way, measured)
            for name, way in _ways(bench_run, problem, head)
            if (measured := bench_run.attempt(f"loss, {head}, {name}", partial(_measure, problem, way, exact, plan)))
        }
        clocks = {name: timed(way, sizes.calls) for name, (way, _) in ways.items()}
        seconds = bench_run.in_turns(f"loss, {head}", clocks, sizes.rounds)
        figures = {name: (seconds[name], *ways[name][1]) for name in seconds}
        rows = [_loss_row(name, figures) for name in figures]
        bench_run.table(f"{head}, {sizes.rows:,} tokens, V = {sizes.vocab_size:,}, bfloat16", rows)
        if rank == sizes.ranks[1] and not trained and len(figures) > 1:
            best = min(figures.keys() - {"materialised"}, key=lambda name: min(seconds[name]))
            bench_run.wanted(f"{head}: ms of {best}, the fastest", "<= 1", 1000 * statistics.median(seconds[best]))
            if "materialised" in figures:
                share = figures[best][2] / max(1, figures["materialised"][2])
                bench_run.wanted(f"{head}: memory of {best}, of the materialised", "<= 0.03", share)
        del problem, exact, ways, clocks
        release_memory()


def _loss_row(name: str, figures: dict[str, tuple[list[float], dict[str, float], int]]) -> dict[str, str]:
    seconds, errors, peak = figures[name]
    row = {"way": name, "ms": seconds_cell(seconds), "MB": f"{peak / 1e6:.0f}"}
    if "materialised" in figures:
        whole_seconds, _, whole_peak = figures["materialised"]
        row |= {
            "ms, of materialised": ratios(seconds, whole_seconds),
            "MB, of materialised": f"{peak / max(1, whole_peak):.3f}",
        }
    return row | {what: f"{error:.1e}" for what, error in errors.items()}


def _ways(bench_run: BenchRun, problem: Problem, head: str) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Find what can take this loss here, by name; say why the others cannot."""
    yield "materialised", problem.materialised
    for backend in BACKENDS:
        if backend not in ("auto", "logits"):
            way = replace(problem, backend=backend).blockwise
            try:
                way()
            except ValueError as error:
                bench_run.leave_out(f"loss, {head.partition(', ')[2]}, {backend}: {first_line(error).rstrip('.')}")
                continue
            except Exception:
                pass  # to be met again, and noted, where it is measured
            yield backend, way
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield "liger", lambda: problem.backward(loss(problem.weight, problem.hidden, problem.labels))


def _measure(
    problem: Problem, way: Callable[[], torch.Tensor], exact: tuple, plan: Plan
) -> tuple[dict[str, float], int]:
    """Find the errors of a way, and how many bytes it takes beyond its inputs."""
    errors = problem.errors(way(), exact)
    problem.hidden.grad = problem.weight.grad = None
    release_memory()
    with PeakMemory(plan.device) as peak:
        way()
    return errors, peak.bytes


def training_steps(bench_run: BenchRun, plan: Plan) -> None:
    """Steps of the stock model, of ours unfactorized, factorized and with LoRA, in mixed precision, compiled."""
    sizes = plan.sizes
    peak = _matrix_products(plan)
    bench_run.say(f"\nMatrix product of {sizes.matrix} x {sizes.matrix}, bfloat16: {peak / 1e12:.4g} TFLOP/s.")
    for dtype in ("bfloat16", "float16" if plan.device == "cuda" else "float32"):
        arguments = training.TrainingArguments(
            ranks=[*sizes.ranks],
            block_size=sizes.block_size,
            batch_size=sizes.batch_size,
            dtype=dtype,
            compile=True,
            compile_backend=plan.compiler,
            device=plan.device,
            steps=sizes.steps,
            **sizes.shape,
        )
        models, smallest = dict(training.models(arguments)), f"k = {sizes.ranks[0]}"
        # Those that figures are wanted of come first: compiling may take all the time.
        names = ["unfactorized", smallest, "stock", f"{smallest}, LoRA", *(f"k = {rank}" for rank in sizes.ranks[1:])]
        steps = {name: training.TrainerSteps(models[name], arguments) for name in names if name in models}
        del models
        seconds = bench_run.in_turns(f"training, {dtype}", steps, sizes.rounds)
        if not seconds:
            continue
        rows = training.rows(arguments, seconds)
        tokens = sizes.batch_size * sizes.block_size
        for row, (name, measured) in zip(rows, seconds.items(), strict=True):
            row["share of peak"] = f"{tokens * _flops(name, plan) / min(measured) / peak:.1%}"
            row["peak memory, GB"] = f"{steps[name].peak_bytes / 1e9:.2f}"
        bench_run.table(f"Training, {dtype}, {sizes.batch_size} x {sizes.block_size} tokens, compiled", rows)
        _compare_with_wanted(bench_run, plan, dtype, seconds, peak)
        del steps
        release_memory()


def _compare_with_wanted(
    bench_run: BenchRun, plan: Plan, dtype: str, seconds: dict[str, list[float]], peak: float
) -> None:
    name = f"k = {plan.sizes.ranks[0]}"
    if name not in seconds:
        return
    step = statistics.median(seconds[name])
    for other, bound in (("unfactorized", ">= 1.25"), ("stock", ">= 1.9")):
        if other in seconds:
            bench_run.wanted(f"{dtype}: {other} / {name}", bound, statistics.median(seconds[other]) / step)
    tokens = plan.sizes.batch_size * plan.sizes.block_size
    bench_run.wanted(f"{dtype}: share of peak, {name}", ">= 0.45", tokens * _flops(name, plan) / step / peak)


def _flops(name: str, plan: Plan) -> float:
    """Count what training takes a token, for a model by its name in `training.models`."""
    sizes = plan.sizes
    rank = int(name.split()[2].rstrip(",")) if name.startswith("k = ") else None
    arguments = scaling.ScalingArguments(block_size=sizes.block_size, lora_rank=training.LORA_RANK, **sizes.shape)
    return scaling.load(arguments, rank, name.endswith("LoRA")).flops


def _matrix_products(plan: Plan) -> float:
    """Measure how many operations a second the product of two large matrices reaches."""
    size = plan.sizes.matrix
    one, other = (torch.randn(size, size, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    product_of_both = timed(lambda: one @ other, plan.sizes.calls)
    return 2 * size**3 / min(product_of_both() for _ in range(5))


@torch.no_grad()
def decoding_steps(bench_run: BenchRun, plan: Plan) -> None:
    """Greedy decoding in bfloat16: a plain loop, and a static cache with a compiled forward pass."""
    sizes = plan.sizes
    for batch in sizes.batches:
        rows = []
        arguments = decoding.DecodingArguments(
            tokens=sizes.tokens, batch=batch, compile_backend=plan.compiler, device=plan.device, **sizes.shape
        )
        models = {rank: decoding.new_model(arguments, rank).bfloat16() for rank in (None, *sizes.ranks[:2])}
        forms = {"eager": decoding.loop, "static cache, compiled": decoding.compiled}
        for form, decoder in forms.items():
            decoders = {f"k = {rank or '-'}": decoder(arguments, model) for rank, model in models.items()}
            seconds = bench_run.in_turns(f"decoding, {form}, batch {batch}", decoders, sizes.rounds)
            whole = seconds.get("k = -")
            rows += [
                {
                    "form": form,
                    "k": name.removeprefix("k = "),
                    "ms a step": seconds_cell(measured),
                    "tokens a second": f"{batch / statistics.median(measured):.0f}",
                    "unfactorized / this": ratios(whole, measured) if whole else "",
                }
                for name, measured in seconds.items()
            ]
        bench_run.table(f"Decoding, batch {batch}, bfloat16, {sizes.tokens} new tokens", rows)
