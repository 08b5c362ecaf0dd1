"""A run of a few short steps, for the recorder: notes when each began and ended."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.harness.recorder import Recorder

if __name__ == "__main__":
    seconds, steps, notes = float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    recorder, times = Recorder(), []
    for step in range(steps):
        began = time.time()
        time.sleep(seconds)
        times.append((began, time.time()))
        recorder.loss(1.0 / (step + 1))
        notes.write_text(json.dumps(times))
        recorder.step()
    raise AssertionError("the recorder ends the process after the last turn")
