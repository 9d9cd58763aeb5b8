"""Do several runs, one after the other, in the processes of one launch: `run_configs.py [--shard] CONFIG ...`."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from factorized_gpt2.cli.train import train

start = PartialState.__init__


def start_as_with_gpus(self, *args, **kwargs):
    """Let accelerate shard on a CPU too, which it does for GPUs only."""
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--shard" in words:
        words.remove("--shard")
        PartialState.__init__ = start_as_with_gpus
    for config in words:
        train(["--config", config])
