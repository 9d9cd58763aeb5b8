"""This process, and fresh ones, as clients of the stand-in for the Hub."""

import os
import subprocess
import sys
import traceback

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _http

from factorized_gpt2.common.errors import UserError

TOKEN, READER_TOKEN, WRONG_TOKEN = "hf_secretOfTheOwner", "hf_secretOfTheReader", "hf_secretOfNobody"


def reach(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Let this process reach the stand-in and nothing else, without a token of its own, and without waiting."""
    hub.heal()
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", "/no/such/token")
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(_http.time, "sleep", lambda seconds: None)


def fresh_process(hub, tmp_path, script: str, *words, **environment) -> subprocess.CompletedProcess:
    """Run Python code in a new process, with an empty cache and none of this one's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, *words, "-c", script, str(tmp_path / "out.pt")]
    done = subprocess.run(
        command,
        env=kept | settings | environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def refusal(publishing) -> str:
    """Return the one line of the error, having seen that no token can be read off it, nor off its traceback."""
    with pytest.raises(UserError) as caught:
        publishing()
    shown = "".join(traceback.format_exception(caught.value))
    for token in (TOKEN, READER_TOKEN, WRONG_TOKEN):
        assert token not in shown
    message = str(caught.value)
    assert "\n" not in message
    return message
