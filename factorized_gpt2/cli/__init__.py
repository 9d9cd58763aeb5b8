"""The commands, one module each; `shell` is what they share. Nothing imports from here.

A module imports what reads words, and only once those are judged what computes, which takes seconds: in its function,
or where there is much of it from a module of its own (`compressing`, `demonstration`).
"""
