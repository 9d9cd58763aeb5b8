#!/usr/bin/env python
"""Run the thirteen experiments, or a smaller grid like them: see `--help` and README.md."""

from factorized_gpt2.cli.experiments import main

if __name__ == "__main__":
    main()
