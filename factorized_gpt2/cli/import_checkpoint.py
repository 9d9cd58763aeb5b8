"""`import_checkpoint.py`: convert a checkpoint of nanoGPT, or of its factorized fork, to a model folder."""

import glob
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from transformers.utils import CONFIG_NAME

from ..common.errors import UserError
from ..common.files import replacing_folder
from ..common.folder_lock import compress_alone
from ..common.weight_files import MODEL_FILES
from ..settings.devices import DtypeArguments
from ..settings.outputs import PublishArguments
from ..settings.parsing import ManualParser
from ..settings.setting_values import OUTPUT_FOLDER, READ
from .shell import run_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..network.modeling_factorized_gpt2 import FactorizedGPT2

logger = logging.getLogger(__name__)


@dataclass
class ImportArguments:
    """Which checkpoint to convert, and where to save the model."""

    checkpoint: Annotated[str, READ] = field(
        metadata={"help": "Checkpoint file, such as out/ckpt.pt. Nothing in it is executed."}
    )
    output_dir: Annotated[str, OUTPUT_FOLDER] = field(metadata={"help": "Folder to save the model in."})
    wte_npy: Annotated[str, READ] | None = field(
        default=None, metadata={"help": ".npy file with an embedding (V, k) that replaces the checkpoint's."}
    )
    scale_npz: Annotated[str, READ] | None = field(
        default=None,
        metadata={
            "help": ".npz file with scale_up and scale_down that replace the checkpoint's. Either may be transposed."
        },
    )
    activation_function: str | None = field(
        default=None,
        metadata={
            "help": "Activation of the MLP, for checkpoints that do not name it. gelu is what nanoGPT uses since May "
            "2023; older checkpoints need gelu_new, the tanh approximation. Default: gelu.",
            "choices": ["gelu", "gelu_new"],
        },
    )
    tokenizer: Annotated[str, READ] | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer to save with the model."}
    )
    cut_vocabulary: bool = field(
        default=False,
        metadata={
            "help": "Drop the embedding rows beyond the tokenizer's size, with which nanoGPT pads. Needs tokenizer."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a model that is already in output_dir. Other files there stay."}
    )


def import_checkpoint(argv: list[str]) -> None:
    """Load the checkpoint, adapt it to the tokenizer, save the model folder."""
    arguments, numbers, publishing = ManualParser(
        (ImportArguments, DtypeArguments, PublishArguments),
        prog="import_checkpoint.py",
        description="Convert a checkpoint of nanoGPT, or of its factorized fork, to a model folder.",
        usage="%(prog)s --checkpoint FILE --output_dir FOLDER [option ...]",
        examples=(
            "import_checkpoint.py --checkpoint out/ckpt.pt --output_dir gpt_nano --tokenizer openai-community/gpt2",
        ),
    ).parse(argv)
    if arguments.cut_vocabulary and arguments.tokenizer is None:
        raise UserError("cut_vocabulary needs a tokenizer: set tokenizer.")
    folder = Path(arguments.output_dir)
    _check_place(folder, arguments.overwrite)
    # What follows takes seconds to import.
    from ..hub.repository import check_access, publish
    from ..models.dtypes import in_dtype
    from ..models.sizes import model_size
    from ..models.verification import verify_copy
    from ..nanogpt.checkpoints import load_old_checkpoint
    from ..text.tokenizer_files import save_tokenizer
    from ..text.tokenizers import load_tokenizer

    if publishing.push_to_hub:
        check_access(None, publishing.push_to_hub)
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    logger.info("Reading %s", arguments.checkpoint)
    model = load_old_checkpoint(
        arguments.checkpoint,
        wte_npy=arguments.wte_npy,
        scale_npz=arguments.scale_npz,
        activation_function=arguments.activation_function,
    )
    if tokenizer is not None:
        _fit(model, tokenizer, arguments.cut_vocabulary)
    model = in_dtype(model, numbers.dtype)
    alone = compress_alone(folder.parent, wait=True, names=(glob.escape(folder.name),))
    with alone, replacing_folder(folder, MODEL_FILES) as temporary:
        _check_place(folder, arguments.overwrite)
        model.save_pretrained(temporary)
        verify_copy(model, temporary, name=folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary, model.config.n_positions)
    config = model.config
    logger.info(
        "%s: %d layers, d = %d, V = %d, %s, %s, %s parameters",
        folder,
        config.n_layer,
        config.n_embd,
        config.vocab_size,
        f"k = {config.n_embd_wte}" if config.is_factorized else "not factorized",
        "tied" if config.tie_word_embeddings else "untied",
        f"{model_size(model).parameters:,}",
    )
    if publishing.push_to_hub:
        print(f"Published: {publish(folder, publishing.push_to_hub, private=publishing.private or None)}")


def _check_place(folder: Path, overwrite: bool) -> None:
    """Refuse to write over anything but a folder that is empty or, with consent, a model's and nothing else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not overwrite:
        raise UserError(
            f"{folder} exists already: remove it, or, if it holds a model, replace the model with --overwrite."
        )
    if not (folder / CONFIG_NAME).is_file() or any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"{folder} contains other things than a model: remove it, or choose another output_dir.")


def _fit(model: "FactorizedGPT2", tokenizer: "PreTrainedTokenizerBase", cut: bool) -> None:
    """Make a model's vocabulary and special tokens those of a tokenizer."""
    from ..models.loading import check_tokenizer
    from ..text.tokenizers import vocabulary_size

    check_tokenizer(model, tokenizer)
    surplus = model.config.vocab_size - vocabulary_size(tokenizer)
    if surplus and cut:
        model.resize_token_embeddings(vocabulary_size(tokenizer))
        logger.info("Dropped the last %d rows of the vocabulary, which have no tokens", surplus)
    elif surplus:
        logger.info("The last %d rows of the vocabulary have no tokens; --cut_vocabulary True drops them", surplus)
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))


def main() -> None:
    """Entry point of the console command and of `import_checkpoint.py`."""
    sys.exit(run_command(import_checkpoint))


if __name__ == "__main__":
    main()
