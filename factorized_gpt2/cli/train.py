"""`train_hf.py`: train, fine-tune or evaluate one model."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.flags import PRINT_CONFIG, read_flags, validate_flags
from .shell import keep_stdout_for_results, run_command

if TYPE_CHECKING:
    from ..runs.settings import Run


def train(argv: list[str]) -> None:
    """Read the settings, do the run (or only print its config), say how it went, publish it if asked."""
    flags = read_flags(argv)
    validate_flags(flags)
    # What follows takes seconds to import.
    keep_stdout_for_results()
    from ..runs.settings import parse_run

    run = parse_run(flags)
    training, speaks = run.training, run.training.process_index == 0
    if PRINT_CONFIG in argv:
        if speaks:
            print(json.dumps(run.config(), indent=2))
        return
    from ..hub.repository import check_access
    from ..runs.results import megabytes
    from ..runs.run import run_experiment

    repository, training.push_to_hub = training.push_to_hub, None  # the Trainer would push checkpoints too
    if repository:
        check_access(None, repository, training.hub_base_model_id)
    results = run_experiment(run)
    if speaks:
        print(
            f"{results.run_name}: validation loss {results.eval_loss:.4f}, perplexity {results.perplexity:.2f}, "
            f"{results.parameters / 1e6:.1f} M parameters, {megabytes(results.bytes)} MB -> {training.output_dir}"
        )
    if repository and speaks:
        _publish(run, repository)


def _publish(run: "Run", repository: str) -> None:
    """Publish the model, and the adapter where its base is on the Hub."""
    from ..hub.repository import publish, publish_adapter
    from ..runs.folder import ADAPTER_NAME

    training, folder = run.training, Path(run.training.output_dir)
    options: dict[str, Any] = {"private": training.private or None, "revision": training.hub_revision}
    print(f"Published: {publish(folder, repository, **options)}")
    if run.adapter.lora_rank and training.hub_base_model_id:
        adapter = publish_adapter(
            folder / ADAPTER_NAME, f"{repository}-adapter", training.hub_base_model_id, **options
        )
        print(f"Published: {adapter}")


def main() -> None:
    """Entry point of the console command and of `train_hf.py`."""
    sys.exit(run_command(train))


if __name__ == "__main__":
    main()
