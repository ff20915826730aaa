"""Ten million documents: start-up, later epochs and memory of ``SequenceShardSampler``, and how good its packs are.

Each source tree runs in processes of its own, taking turns. Processor time, since it hardly feels what else the machine
is doing; memory is the peak of the process above what it held with the lengths alone. The start is from the lengths to
the first pack of epoch 0, a later epoch from ``set_epoch`` to its first pack, on 8 data-parallel ranks.

    python benchmarks/sampler.py                                       # this tree, three minutes
    git worktree add /tmp/before 0a8f005
    python benchmarks/sampler.py --trees /tmp/before . --rounds 3      # side by side
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

RANKS, MEANS_PER_PACK = 8, 16


def memory(name: str) -> float:
    """MiB: VmRSS is what the process holds, VmHWM the most that it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure(documents: int, overlong: str) -> dict[str, float]:
    import numpy as np

    from lightning_ulysses.data import SequenceShardSampler

    warnings.filterwarnings("ignore", message=".*longer than max_tokens")
    lengths = np.random.default_rng(0).lognormal(6, 1, documents).astype(np.int64) + 1
    max_tokens = int(np.ceil(MEANS_PER_PACK * lengths.mean()))
    # Forgets the peak that making the lengths had.
    Path("/proc/self/clear_refs").write_text("5")
    held, begun, wall = memory("VmRSS"), time.process_time(), time.perf_counter()
    settings = {"overlong": overlong, "num_replicas": RANKS, "rank": 3}
    sampler = SequenceShardSampler(range(documents), lengths, max_tokens, **settings)  # type: ignore[arg-type]
    next(iter(sampler))
    found = {"start s": time.process_time() - begun, "start wall s": time.perf_counter() - wall}
    found["start MiB"] = memory("VmHWM") - held
    epochs = []
    for epoch in (1, 2):
        begun = time.process_time()
        sampler.set_epoch(epoch)
        next(iter(sampler))
        epochs.append(time.process_time() - begun)
    found["epoch s"] = min(epochs)
    found["peak MiB"] = memory("VmHWM") - held
    report = sampler.report()
    found |= {"fill %": 100 * report.fill, "imbalance": report.imbalance, "packs": report.packs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--overlong", default="split")
    parser.add_argument("--trees", nargs="+", default=["."], help="source trees to compare")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.documents, arguments.overlong)))
        return
    print(f"{arguments.documents:,} documents, overlong={arguments.overlong!r}")
    for turn in range(arguments.rounds):
        for tree in arguments.trees:
            command = [sys.executable, __file__, "--here", "--documents", str(arguments.documents)]
            environment = {**os.environ, "PYTHONPATH": str(Path(tree).resolve()), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "--overlong", arguments.overlong],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            if not turn and tree == arguments.trees[0]:
                print("| round | tree | " + " | ".join(found) + " |\n|" + " --- |" * (len(found) + 2))
            print(
                f"| {turn + 1} | {tree} | " + " | ".join(f"{value:.6g}" for value in found.values()) + " |", flush=True
            )


if __name__ == "__main__":
    main()
