"""Makes `examples` importable, and nothing else that lies at the root of the repository."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT))
importlib.import_module("examples")
sys.path.remove(str(ROOT))
