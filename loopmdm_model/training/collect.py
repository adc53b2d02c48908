"""Collect finished runs into JSON lines, one a run: what was asked for and the last point of its curve.

python -m loopmdm.model.training.collect runs/sweep-* > figures/sweeps/learning-rate.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

from loopmdm.model.network.checkpoints import METRICS, RECORD, need


def collect(run: Path) -> dict[str, Any]:
    """Spec, commit and last metrics row of one finished run."""
    record = json.loads(need(run, RECORD).read_text())
    last = json.loads(need(run, METRICS).read_text().splitlines()[-1])
    return {"spec": record["spec"], "commit": record["commit"], "last": last}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if (Path(name) / RECORD).is_file():
            print(json.dumps(collect(Path(name))))
