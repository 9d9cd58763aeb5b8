"""The layout of `--help`."""

import argparse
from collections.abc import Sequence

EXIT_STATUS = """\
Exit status: 0 after success; 2 after bad input, with one line on stderr that
says what is wrong; 130 after Ctrl-C; 143 after SIGTERM; 1 after a bug."""

_KINDS = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "true|false", "dict": "JSON"}  # by type's name


class HelpPage(argparse.RawDescriptionHelpFormatter):
    """Shows every option once, with the kind of its value, and its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        kind = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {kind}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _KINDS.get(getattr(action.type, "__name__", ""), action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        untold = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, list | dict)
        return text if untold or action.nargs == 0 or "Default:" in text else f"{text} Default: %(default)s."


def hide_negations(parser: argparse.ArgumentParser) -> None:
    """Hide the options `--no_x`, which mean the same as `--x false`."""
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS


def epilog(examples: Sequence[str], remark: str = "") -> str:
    """Write the end of a page: a remark, examples, the exit status."""
    shown = "Examples:\n" + "\n".join(f"  python {example}" for example in examples) if examples else ""
    return "\n\n".join(part for part in (remark, shown, EXIT_STATUS) if part)
