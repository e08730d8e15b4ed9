#!/usr/bin/env python
"""Entry point: python train.py VERB --config FILE ...; `python train.py --help` lists the verbs."""

import sys

from lightning_t2i.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
