"""Time the making of MQAR data: ``python benchmarks/mqar_data.py [--json]``."""

from __future__ import annotations

import json
import os
import sys
import time

from dspace.tasks import mqar, rebinding_mqar

SIZES = [
    ("mqar", {"input_seq_len": 64, "num_kv_pairs": 8, "vocab_size": 256}),
    ("mqar", {"input_seq_len": 512, "num_kv_pairs": 128, "vocab_size": 8192}),
    ("mqar", {"input_seq_len": 1024, "num_kv_pairs": 256, "vocab_size": 8192}),
    ("rebinding_mqar", {"input_seq_len": 512, "num_kv_pairs": 64, "num_updates": 32, "vocab_size": 8192}),
]


def main() -> None:
    rows = []
    for name, sizes in SIZES:
        make = {"mqar": mqar, "rebinding_mqar": rebinding_mqar}[name]
        start = time.perf_counter()
        batch = make(num_examples=100_000, seed=0, **sizes)
        made = time.perf_counter() - start
        start = time.perf_counter()
        digest = batch.hash
        hashed = time.perf_counter() - start
        rows.append(
            {"task": name, **sizes, "examples": 100_000, "seconds": made, "hash_seconds": hashed, "hash": digest}
        )
    if "--json" in sys.argv:
        print(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1))
        return
    for row in rows:
        print(
            f"{row['task']:15} L={row['input_seq_len']:<5} D={row['num_kv_pairs']:<4} 100k examples: "
            f"{row['seconds']:6.2f} s, sha256 {row['hash_seconds']:5.2f} s"
        )


if __name__ == "__main__":
    main()
