"""The commands, one module each; `shell` has what they share. Nothing imports from here.

Importing torch takes seconds. So a module imports only what parses flags. After the flags are checked, its function
imports the rest, or the module that does the work (`compressing`, `demonstration`).
"""
