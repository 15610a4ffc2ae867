"""transformers' tests write their own log lines and use their own seeds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
