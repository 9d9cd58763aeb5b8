"""`train_hf.py`: train, fine-tune or evaluate one model."""

import json
import sys

from ..arguments import PRINT_CONFIG, parse_run
from ..training import run_experiment
from .shell import run_command


def train(argv: list[str]) -> None:
    """Read the settings, do the run (or only print its config), say how it went."""
    run = parse_run(argv)
    if PRINT_CONFIG in argv:
        if run.training.should_log:
            print(json.dumps(run.config(), indent=2))
        return
    results = run_experiment(run)
    if run.training.should_log:
        print(
            f"{results.run_name}: validation loss {results.eval_loss:.4f}, perplexity {results.perplexity:.2f}, "
            f"{results.parameters / 1e6:.1f} M parameters, {results.bytes / 1e6:.1f} MB -> {run.training.output_dir}"
        )


def main() -> None:
    """Entry point of the console command and of `train_hf.py`."""
    sys.exit(run_command(train))


if __name__ == "__main__":
    main()
