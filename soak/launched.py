"""Stop and kill a training of two processes, launch it again, and compare its weights with an undisturbed one's.

`python soak/launched.py` launches as `configs/accelerate/two_cpu_processes.yaml` says.
"""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
from workshop import FULL, conclude, outcome, prepare

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.settings.flags import as_flags
from factorized_gpt2.settings.parsing import ManualParser

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = ["accelerate.commands.launch", "--config_file", REPOSITORY / "configs/accelerate/two_cpu_processes.yaml"]
WORDS = as_flags(FULL | {"max_steps": 300, "eval_steps": 100, "save_steps": 100})


@dataclass
class LaunchedArguments:
    """Nothing to set."""


def launch(folder: Path, number: int | None = None, step: int = 0, whom: str = "launcher") -> tuple[int, str]:
    """Launch the training, send a signal when a step is logged, and wait for the end.

    Args:
        folder: Where it runs.
        number: The signal's.
        step: Whose line of the log is waited for.
        whom: The `launcher`, `one` process that trains, or `all`, the launcher too.

    Returns:
        The launcher's exit code, and what was said.
    """
    command = [sys.executable, "-m", *map(str, LAUNCH), str(REPOSITORY / "train_hf.py"), *WORDS]
    with subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if number is not None and line.startswith(f"step {step} of"):
                launcher = psutil.Process(process.pid)
                trainers = launcher.children(recursive=True)
                for target in {"launcher": [launcher], "one": trainers[-1:], "all": [launcher, *trainers]}[whom]:
                    target.send_signal(number)
    return process.returncode, "".join(lines)


def soak(argv: list[str]) -> None:
    """Disturb the training in several ways, print the table.

    Raises:
        UserError: Something came to another end.
    """
    ManualParser(LaunchedArguments, prog="launched.py", description="Stop two processes at once.").parse(argv)
    root, rows = Path(tempfile.mkdtemp(prefix="launched-")), []
    prepare(root / "undisturbed")
    shutil.copytree(root / "undisturbed", root / "disturbed")
    code, said = launch(root / "undisturbed")
    if code != 0:
        raise UserError(f"It does not even run undisturbed: {said[-3000:]}")
    expected = outcome(root / "undisturbed/models")
    for number, whom in (
        (signal.SIGTERM, "launcher"),
        (signal.SIGINT, "launcher"),
        (signal.SIGTERM, "all"),
        (signal.SIGTERM, "one"),
        (signal.SIGKILL, "all"),
    ):
        shutil.rmtree(root / "disturbed/models", ignore_errors=True)
        step = 150 if number == signal.SIGKILL else 20  # after and before the first checkpoint that is due
        code, said = launch(root / "disturbed", number, step, whom)
        saved = re.search(r"with step (\d+) saved", said)
        again, log = launch(root / "disturbed")
        went_on = re.search(r"Going on from \S*(checkpoint-\d+)", log)
        found = outcome(root / "disturbed/models")
        is_same = again == 0 and found == expected
        if number != signal.SIGKILL and (saved is None or went_on is None or went_on[1] != f"checkpoint-{saved[1]}"):
            is_same = False
        rows.append(
            {
                "signal": signal.Signals(number).name,
                "to": whom,
                "launcher ended with": str(code),
                "saved": saved[1] if saved else "-",
                "went on from": went_on[1] if went_on else "the start",
                "same": "yes" if is_same else f"no: {said[-1500:]} {log[-1500:]}",
            }
        )
        sys.stderr.write(f"{' | '.join(rows[-1].values())}\n")
    conclude(rows, root)


if __name__ == "__main__":
    sys.exit(run_command(soak))
