"""Renders the API reference: python docs/build.py OUTPUT.

`ckpt` imports its names when they are first used; the renderer only sees what is there, so they are used first.
"""

import sys
from pathlib import Path

import pdoc

import ckpt

if __name__ == "__main__":
    for name in ckpt.__all__:
        setattr(ckpt, name, getattr(ckpt, name))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("ckpt", output_directory=Path(sys.argv[1]))
