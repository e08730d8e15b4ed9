#!/usr/bin/env python
"""Entry point: python train.py VERB --config FILE ...; `python train.py --help` lists the verbs."""

import faulthandler
import sys

from lightning_t2i.cli.main import main

if __name__ == "__main__":
    faulthandler.enable()  # a crash in a library's machine code names the Python lines that led there
    sys.exit(main())
