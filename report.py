#!/usr/bin/env python
"""Make a table and pictures from the results of runs: see `--help` and README.md."""

from factorized_gpt2.cli.report import main

if __name__ == "__main__":
    main()
