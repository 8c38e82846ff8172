"""``python results/2026-11-22_evidence/redraw [OUT]``; without OUT, into the result itself."""

import sys
from pathlib import Path

from draw import HERE, draw

draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
