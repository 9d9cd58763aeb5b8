#!/usr/bin/env python
"""Make a model folder of a checkpoint of nanoGPT: see `--help` and README.md."""

from factorized_gpt2.cli.import_checkpoint import main

if __name__ == "__main__":
    main()
