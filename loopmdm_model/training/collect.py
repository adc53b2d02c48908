"""Collect finished runs into JSON lines, one a run: what was asked for and the last point of its curve.

python -m loopmdm.model.training.collect runs/sweep-* > figures/sweeps/learning-rate.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

from loopmdm.model.files import read_json_lines
from loopmdm.model.network.checkpoints import METRICS, RECORD, need, read_record


def collect(run: Path) -> dict[str, Any]:
    """Spec, commit and last metrics row of one finished run."""
    record, (*_, last) = read_record(run), read_json_lines(need(run, METRICS))
    return {"spec": record["spec"], "commit": record["commit"], "last": last}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if (Path(name) / RECORD).is_file():
            print(json.dumps(collect(Path(name))))
