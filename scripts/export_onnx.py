"""A model as an ONNX file, for runtimes without PyTorch (needs `pip install 'sim-hf[onnx]'`).

    python scripts/export_onnx.py MODEL --output runs/model.onnx

Every option: --help
"""

import sys

from sim_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
