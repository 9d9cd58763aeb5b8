"""The one error that commands show as a line, without a traceback."""


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message names the culprit and the way out."""


def first_line(error: BaseException) -> str:
    """Say in one line what an error of a library says in several, or in none."""
    return (str(error).strip() or repr(error)).splitlines()[0]
