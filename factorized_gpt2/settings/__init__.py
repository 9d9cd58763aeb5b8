"""Parsing and checking of command lines and configs, and the settings that several commands share.

Read `flags`, `parsing`, then `setting_values` for the ranges, and `text_arguments`, `devices` and `outputs` for the
settings that commands share. Nothing here imports torch, so that a command can answer at once.
"""

from ..common.lazy import exporting

__all__ = ["ManualParser", "check_values", "find_config", "load_config"]
__getattr__ = exporting(
    __name__, {"parsing": ["ManualParser", "find_config", "load_config"], "setting_values": ["check_values"]}
)
