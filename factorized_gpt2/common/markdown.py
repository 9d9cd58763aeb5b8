"""Text of others in Markdown: names of runs, files and models, shown as they are and never as markup."""

import re

from .errors import one_line


def escaped(text: object) -> str:
    r"""Escape text for a line or a table's cell: `a|b` becomes `a\|b`, and no tag, link, code or emphasis begins."""
    return re.sub(r"[\\`|<&~*\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def code(text: object) -> str:
    """Show text as code; its own backticks, which would end that, become apostrophes."""
    return f"`{one_line(text).replace('`', chr(39))}`"
