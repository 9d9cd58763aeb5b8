"""The one error that commands show as a line, without a traceback."""


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message names the culprit and the way out."""


def one_line(text: object) -> str:
    """Put text on one line, with spaces for what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()


def first_line(error: BaseException) -> str:
    """Say in one line what an error of a library says in several, or in none."""
    return (str(error).strip() or repr(error)).splitlines()[0]
