"""Files of token ids: flat uint16, little-endian, documents joined by end-of-text, as nanoGPT's `prepare.py` writes.

Nothing is tokenized, copied or cached: blocks are read from where they lie, without `datasets`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..common.errors import UserError, blaming
from ..common.files import replacing_file
from ..common.lfs_pointers import refuse_pointers

LARGEST_VOCABULARY = 2**16  # ids that uint16 holds

_TYPE = np.dtype("<u2")
_CHECKED_AT_ONCE = 2**24  # tokens, a bound on memory


class TokenBlocks(Dataset):
    """Blocks of the tokens of files, one file after the other, in order, without overlap or padding.

    Args:
        files: Of token ids, whose size and ids `load_token_blocks` has checked.
        block_size: Tokens a block.
        keep_tail: Whether the rest that fills no block is one, if it is 2 tokens or more.
    """

    def __init__(self, files: Sequence[str], block_size: int, keep_tail: bool):
        self._made_of = (tuple(files), block_size, keep_tail)
        self._files = [np.memmap(name, _TYPE, mode="r") for name in files]
        sizes = [len(tokens) for tokens in self._files]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._block_size = block_size
        self.tokens = sum(sizes)
        whole, rest = divmod(self.tokens, block_size)
        self._blocks = whole + (keep_tail and rest >= 2)

    def __len__(self) -> int:
        """How many blocks there are."""
        return self._blocks

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Read a block: `input_ids`, int64.

        Raises:
            IndexError: There is none of that number.
        """
        start = self._block_size * range(self._blocks)[index]
        end = start + self._block_size
        parts = [
            tokens[max(0, start - first) : max(0, end - first)]
            for tokens, first in zip(self._files, self._starts, strict=True)
        ]
        return {"input_ids": np.concatenate(parts).astype(np.int64)}

    def __reduce__(self) -> tuple:
        """Open the files anew where a worker process gets a copy; pickled, a memory map is all that it maps."""
        return TokenBlocks, self._made_of


def load_token_blocks(files: Sequence[str], vocab_size: int, block_size: int, keep_tail: bool) -> TokenBlocks:
    """Open files of token ids and check every id.

    Args:
        files: At least one.
        vocab_size: Ids of the tokenizer.
        block_size: As `TokenBlocks` takes it.
        keep_tail: As `TokenBlocks` takes it.

    Returns:
        The blocks, at least one.

    Raises:
        UserError: A file that is not there or holds something else, or too few tokens.
    """
    for name in files:
        _check(name, vocab_size)
    blocks = TokenBlocks([name for name in files if Path(name).stat().st_size], block_size, keep_tail)
    if not len(blocks):
        raise UserError(
            f"{', '.join(files)} has {blocks.tokens} tokens, too few for one block of {block_size}: give more text, "
            "or a smaller block_size."
        )
    return blocks


def write_token_file(path: Path, tokens: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write token ids to a file, whole or not at all.

    Args:
        path: The file, which is replaced.
        tokens: Ids in pieces, (n,) integers each; `token_stream` makes them of text.
        vocab_size: Ids of the tokenizer.

    Returns:
        How many tokens were written.

    Raises:
        UserError: A vocabulary that uint16 does not hold, or an id outside of it.
    """
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"{path}: token ids are stored as uint16, which allows {LARGEST_VOCABULARY:,} tokens; the tokenizer has "
            f"{vocab_size:,}."
        )
    written = 0
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        for piece in tokens:
            if len(piece) and not 0 <= piece.min() <= piece.max() < vocab_size:
                raise UserError(f"{path}: the text has a token id beyond the tokenizer's {vocab_size:,} tokens.")
            file.write(piece.astype(_TYPE).tobytes())
            written += len(piece)
    return written


def _check(name: str, vocab_size: int) -> None:
    path = Path(name)
    refuse_pointers([path])
    if path.is_dir():
        raise UserError(f"{name} is a folder, not a file.")
    if not path.is_file():
        raise UserError(f"The file {name} does not exist.")
    size = path.stat().st_size
    if size % _TYPE.itemsize:
        raise UserError(f"{name} has {size:,} bytes, an odd number: it is not a file of uint16 token ids.")
    with blaming(f"{name} cannot be read", OSError, ValueError):
        tokens = np.memmap(path, _TYPE, mode="r") if size else np.empty(0, _TYPE)
        for start in range(0, len(tokens), _CHECKED_AT_ONCE):
            largest = int(tokens[start : start + _CHECKED_AT_ONCE].max())
            if largest >= vocab_size:
                raise UserError(
                    f"{name} contains the token id {largest}, but the tokenizer has {vocab_size} ids: it was written "
                    "with another tokenizer, or is not a file of uint16 token ids."
                )
