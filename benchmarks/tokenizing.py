"""Tokenizing a corpus of JSONL: processor time, bytes on disk, and the time to read a row, of one or more source trees.

The text is the standard library's own source and documentation, repeated to the size asked for with a number in front
of each document. The tokenizer is a byte-level BPE of 8,000 tokens trained on it, on one thread. Each tree runs in
processes of its own, taking turns, and must give the same tokens. Processor time of `prepare_data`, reading included.

    python benchmarks/tokenizing.py                                                  # this tree, 50 MB, a minute
    git worktree add /tmp/before 0a8f005
    python benchmarks/tokenizing.py --trees /tmp/before . --rounds 3                 # side by side
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path


def make(folder: Path, megabytes: float, characters: int) -> None:
    """Writes the corpus and the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(errors="replace") for file in files]
    pieces = [text[begin : begin + characters] for text in texts for begin in range(0, len(text), characters)]
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    special = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<eos>"], show_progress=False)
    rust.train_from_iterator(pieces[::4], special)
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<eos>").save_pretrained(str(folder / "tokenizer"))
    written, number = 0, 0
    with (folder / "rows.jsonl").open("w") as rows:
        while written < megabytes * 1e6:
            written += rows.write(json.dumps({"text": f"{number} {pieces[number % len(pieces)]}"}) + "\n")
            number += 1


def measure(folder: Path, cache: Path) -> dict[str, float | str]:
    """What one tree takes, as it is installed for this process."""
    from lightning_ulysses import SequenceDataModule

    data = SequenceDataModule(
        str(folder / "rows.jsonl"), str(folder / "tokenizer"), max_tokens=8192, overlong="split", cache_dir=str(cache)
    )
    _ = data.tokenizer
    begun, wall = time.process_time(), time.perf_counter()
    data.prepare_data()
    found: dict[str, float | str] = {"s": time.process_time() - begun, "wall s": time.perf_counter() - wall}
    data.setup("fit")
    documents = data.documents["train"]
    begun = time.process_time()
    digest, tokens = hashlib.blake2b(digest_size=8), 0
    for number in range(len(documents)):
        ids = documents[number]["input_ids"]
        digest.update(ids.astype("<i4").tobytes())
        tokens += len(ids)
    found["row us"] = 1e6 * (time.process_time() - begun) / len(documents)
    size = (folder / "rows.jsonl").stat().st_size
    kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    found |= {"MB/s": size / 1e6 / float(found["s"]), "bytes/token": kept / tokens, "cache/text": kept / size}
    return found | {"tokens": tokens, "digest": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--characters", type=int, default=4000, help="length of a document")
    parser.add_argument("--trees", nargs="+", default=["."], help="source trees to compare")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(*map(Path, arguments.here))))
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), arguments.megabytes, arguments.characters)
        for turn in range(arguments.rounds):
            for tree in arguments.trees:
                environment = {**os.environ, "PYTHONPATH": str(Path(tree).resolve()), "TOKENIZERS_PARALLELISM": "false"}
                command = [sys.executable, __file__, "--here", name, f"{name}/cache"]
                environment["OMP_NUM_THREADS"] = "1"
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                shutil.rmtree(f"{name}/cache")
                found = json.loads(done.stdout.splitlines()[-1])
                if not turn and tree == arguments.trees[0]:
                    print("| round | tree | " + " | ".join(found) + " |\n|" + " --- |" * (len(found) + 2))
                shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in found.values()]
                print(f"| {turn + 1} | {tree} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
