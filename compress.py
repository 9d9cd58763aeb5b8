#!/usr/bin/env python
"""Compress the vocabulary of a trained GPT-2: see `--help` and README.md."""

from factorized_gpt2.cli.compress import main

if __name__ == "__main__":
    main()
