"""``refractor convert`` as a script: ``python tools/convert_checkpoint.py runs/pilot --to hf --out served/pilot``."""

from __future__ import annotations

import sys

from refractor_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
