"""LoRA of the protocol's form from PCA's start and from data-aware ones: loss on held-out text as it trains.

`python benchmarks/lora.py --text books --data_dir DATA`; without --text, on Python's documentation.
"""

import sys
import tempfile
from dataclasses import dataclass, field

from baselines import BaselineArguments, Bench, benches
from tabulate import tabulate
from transformers import TrainingArguments, set_seed

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.runs.fields import LORA_TARGETS
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.blocks import collate_blocks
from factorized_gpt2.trainer.adapters import add_lora
from factorized_gpt2.trainer.distillation import Distillation
from factorized_gpt2.trainer.trainer import FactorizedTrainer


@dataclass
class LoraArguments(BaselineArguments):
    """How long to adapt, and from where."""

    steps: int = field(default=200, metadata={"help": "Steps of 2,048 tokens."})
    refine_steps: int = field(default=100, metadata={"help": "Of the refined start."})
    rank_index: list[int] = field(
        default_factory=lambda: [0, 2], metadata={"help": "Which of d/12, d/6, d/3, 2d/3, counted from 0."}
    )


def main(argv: list[str]) -> None:
    """Train from every start and print the losses on the way."""
    arguments = ManualParser(LoraArguments, prog="lora.py", description=__doc__).parse(argv)[0]
    starts = [("pca", 0, 0.0), ("pca", 0, 0.5), ("joint", 0, 0.0), ("tokenwise", 0, 0.0)]
    starts += [("tokenwise", arguments.refine_steps, 0.0), ("tokenwise", arguments.refine_steps, 0.5)]
    every = max(1, arguments.steps // 8)
    for bench in benches(arguments):
        print(f"seed {bench.seed}: baseline {bench.loss(bench.baseline.model):.4f}", flush=True)
        table = []
        for rank in (bench.ranks()[index] for index in arguments.rank_index):
            for method, refine_steps, weight in starts:
                losses = _adapt(bench, rank, method, refine_steps, weight, arguments.steps, every)
                name = method + (f", refined {refine_steps}" if refine_steps else "")
                table.append({"k": rank, "start": name, "KL weight": weight} | losses)
                print(table[-1], flush=True)
        print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".3f"))


def _adapt(
    bench: Bench, rank: int, method: str, refine_steps: int, weight: float, steps: int, every: int
) -> dict[str, float]:
    model, _ = bench.compressor(method, refine_steps=refine_steps).make(rank)
    losses = {"step 0": bench.loss(model)}
    set_seed(bench.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            warmup_steps=10,
            adam_beta2=0.95,
            weight_decay=0.01,
            eval_strategy="steps",
            eval_steps=every,
            per_device_eval_batch_size=16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=bench.seed,
        )
        trainer = FactorizedTrainer(
            distillation=Distillation(bench.baseline.model, weight) if weight else None,
            model=add_lora(model, rank=32, alpha=64, dropout=0.1, target_modules=LORA_TARGETS),
            args=arguments,
            train_dataset=bench.calibration.blocks,
            eval_dataset=bench.held_out,
            data_collator=collate_blocks,
        )
        trainer.train()
    return losses | {f"{row['step']}": row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}


if __name__ == "__main__":
    sys.exit(run_command(main))
