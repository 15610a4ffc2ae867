"""`python -m sim_hf ...` and `accelerate launch -m sim_hf ...`."""

import sys

from sim_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
