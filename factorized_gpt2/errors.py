"""The one error that commands show as a line, without a traceback."""


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message names the culprit and the way out."""
