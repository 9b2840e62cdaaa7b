#!/usr/bin/env python3
"""Show the newest training run with TensorBoard: `cloud_services.py start-tensorboard`.

    python scripts/start_tensorboard.py --all

All flags are those of the command.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloud_services import main  # the project's folder must be on the path first

if __name__ == "__main__":
    sys.exit(main(["start-tensorboard", *sys.argv[1:]]))
