"""How fast rows become prepared pairs: `python -m benchmarks.prepare --tokenizer MODEL --rows 20000 --tokens 500`.

Makes a JSON Lines file of chat rows of about so many tokens (prompt and both responses together), prepares it in an
empty cache and prints rows per second and the preparing process's CPU time and peak memory. With --processes 1 all is
done in that process, so that CPU time per row compares versions also on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dsdpo.config.run import DataConfig
from dsdpo.data.tokenize import open_pairs, prepare_pairs

WORDS = ("the", "model", "answers", "a", "question", "about", "data", "and", "says", "why", "it", "is", "so", "plain")


def write_rows(path: Path, *, rows: int, tokens: int) -> None:
    """Rows of random words: two fifths of `tokens` in the prompt, the rest in both responses."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choices(WORDS, k=length))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {
                "prompt": [{"role": "user", "content": text(max(1, tokens * 2 // 5))}],
                "chosen": [{"role": "assistant", "content": text(max(1, tokens * 3 // 10))}],
                "rejected": [{"role": "assistant", "content": text(max(2, tokens * 3 // 10)) + " not"}],
            }
            file.write(json.dumps(row) + "\n")


def used() -> tuple[float, float]:
    """CPU seconds and peak memory (MiB) of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--tokens", type=int, default=500, help="of a row, about")
    parser.add_argument("--processes", type=int, default=None, help="data.dataset_num_proc")
    options = parser.parse_args(argv)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows=options.rows, tokens=options.tokens)
        cpu_before, mib_before = used()
        data = DataConfig.model_validate(
            {"train": str(path), "cache_dir": folder, "max_length": 8192, "dataset_num_proc": options.processes}
        )
        started = time.perf_counter()
        pairs = open_pairs(prepare_pairs(data.train, tokenizer, data=data, seed=0, default_split="train"))
        seconds = time.perf_counter() - started
        cpu, mib = used()
        tokens_per_row = float(pairs.lengths.sum(dtype="int64")) / len(pairs)
    result = {
        "rows": len(pairs),
        "tokens_per_row": round(tokens_per_row, 1),
        "processes": options.processes,
        "seconds": round(seconds, 2),
        "rows_per_s": round(len(pairs) / seconds, 1),
        "cpu_ms_per_row": round(1000 * (cpu - cpu_before) / len(pairs), 3),
        "start_mib": round(mib_before),
        "peak_mib": round(mib),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
