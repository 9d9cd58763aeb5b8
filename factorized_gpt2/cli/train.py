"""`train_hf.py`: train, fine-tune or evaluate one model."""

import json
import sys
from pathlib import Path

from ..common.errors import UserError
from ..hub.repository import check_access, publish, publish_adapter
from ..runs.folder import ADAPTER_NAME
from ..runs.results import megabytes
from ..runs.run import run_experiment
from ..runs.settings import PRINT_CONFIG, Run, parse_run
from .shell import run_command


def train(argv: list[str]) -> None:
    """Read the settings, do the run (or only print its config), say how it went, publish it if asked."""
    run = parse_run(argv)
    training, speaks = run.training, run.training.process_index == 0
    if PRINT_CONFIG in argv:
        if speaks:
            print(json.dumps(run.config(), indent=2))
        return
    is_published, training.push_to_hub = training.push_to_hub, False  # the Trainer would push checkpoints too
    if is_published:
        if not training.hub_model_id:
            raise UserError("push_to_hub needs hub_model_id, such as USER/NAME.")
        check_access(None, training.hub_model_id, training.hub_base_model_id)
    results = run_experiment(run)
    if speaks:
        print(
            f"{results.run_name}: validation loss {results.eval_loss:.4f}, perplexity {results.perplexity:.2f}, "
            f"{results.parameters / 1e6:.1f} M parameters, {megabytes(results.bytes)} MB -> {training.output_dir}"
        )
    if is_published and speaks:
        _publish(run)


def _publish(run: Run) -> None:
    """Publish the model, and the adapter where its base is on the Hub."""
    training, folder = run.training, Path(run.training.output_dir)
    options = {"private": training.hub_private_repo, "revision": training.hub_revision}
    print(f"Published: {publish(folder, training.hub_model_id, **options)}")
    if run.adapter.lora_rank and training.hub_base_model_id:
        name = f"{training.hub_model_id}-adapter"
        print(f"Published: {publish_adapter(folder / ADAPTER_NAME, name, training.hub_base_model_id, **options)}")


def main() -> None:
    """Entry point of the console command and of `train_hf.py`."""
    sys.exit(run_command(train))


if __name__ == "__main__":
    main()
