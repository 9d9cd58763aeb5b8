#!/usr/bin/env python
"""Measure the loss of saved models on a text: see `--help` and README.md."""

from factorized_gpt2.cli.evaluate import main

if __name__ == "__main__":
    main()
