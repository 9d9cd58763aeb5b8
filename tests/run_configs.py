"""Do several runs, one after the other, in the processes of one launch: `run_configs.py [--shard] CONFIG ...`."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.cli.train import train
from factorized_gpt2.trainer.trainer import FactorizedTrainer

start = PartialState.__init__
training_step = FactorizedTrainer.training_step


def start_as_with_gpus(self, *args, **kwargs):
    """Let accelerate shard on a CPU too, which it does for GPUs only."""
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def spoil_in_one_process(self, *args, **kwargs):
    """Let the second process alone see a NaN, in its third step."""
    loss = training_step(self, *args, **kwargs)
    return loss * float("nan") if self.args.process_index == 1 and self.state.global_step == 2 else loss


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--shard" in words:
        words.remove("--shard")
        PartialState.__init__ = start_as_with_gpus
    if "--spoil" in words:
        words.remove("--spoil")
        FactorizedTrainer.training_step = spoil_in_one_process
    codes = {run_command(train, ["--config", config]) for config in words}
    sys.exit(max(codes))
