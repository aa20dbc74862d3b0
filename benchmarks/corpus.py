"""Time and peak memory of curating, synthesizing, describing and exporting a corpus of the paper's size.

    python benchmarks/corpus.py [--rows 123096] [--keep DIR]

Made-up rows in the shares of Table 6 (text 52%, images 11%, both 37%), each with a different
drawing of 336 pixels. Every step is one command in a separate process, whose peak memory is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIDE, SHAPES = 336, 12
TEXT, IMAGE = 0.518, 0.108
WORDS = ("bread", "cake", "soup", "tea", "jam", "rice", "pie", "stew", "bake", "boil", "serve", "slice", "warm", "cold")
COMMAND = [sys.executable, "-c", "from guardreasoner_vl.cli.app import main; main()"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) * (rng.random() < 0.2) for _ in range(words))


def draw(folder: Path, number: int) -> str:
    """A different image for each row, so that every file is decoded and compared."""
    rng = random.Random(number)
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        x, y, size = rng.randrange(SIDE), rng.randrange(SIDE), rng.randrange(20, 160)
        pen.ellipse((x, y, x + size, y + size // 2 + 5), fill=tuple(rng.randrange(256) for _ in range(3)))
    name = f"{number}.jpg"
    image.save(folder / name, quality=85)
    return name


def draw_all(folder: Path, numbers: range) -> None:
    for number in numbers:
        draw(folder, number)


def make(folder: Path, rows: int) -> None:
    """Write `rows` rows and their images."""
    folder.mkdir(parents=True)
    texts, images = round(rows * TEXT), round(rows * IMAGE)
    step = max(1, (rows - texts) // 64)
    with ProcessPoolExecutor() as pool:
        parts = [range(start, min(start + step, rows)) for start in range(texts, rows, step)]
        list(pool.map(draw_all, [folder] * len(parts), parts))
    rng = random.Random(0)
    with (folder / "train.jsonl").open("w") as stream:
        for number in range(rows):
            row: dict[str, Any] = {
                "id": f"made-{number}",
                "source": "made",
                "request_label": rng.choice(("harmful", "unharmful")),
            }
            modality = "text" if number < texts else "image" if number < texts + images else "text-image"
            row["modality"] = modality
            row["prompt"] = "" if modality == "image" else sentence(rng, rng.randrange(8, 120))
            if modality != "text":
                row["images"] = [f"{number}.jpg"]
            if modality != "image" and rng.random() < 0.6:
                row |= {"response": sentence(rng, rng.randrange(20, 200)), "response_label": "unharmful"}
            stream.write(json.dumps(row) + "\n")


def run(name: str, *arguments: str | Path) -> str:
    """Run one command; gives a table line with its seconds and peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    stderr = process.stderr.read().decode() if process.stderr else ""
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{name}: {stderr}")
    return f"| {name} | {seconds:,.0f} s | {used.ru_maxrss / 2**20:.2f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=123_096)
    parser.add_argument("--keep", type=Path, help="a new folder for everything that is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder)
        make(root / "data" / "made", arguments.rows)
        recipe, corpus = root / "recipe.yaml", root / "corpus"
        source = {"folder": "made", "origin": "made here", "licence": "CC0"}
        recipe.write_text(json.dumps({"name": "recipe", "data": {"sources": [source], "duplicates": {}}}))
        print(f"{arguments.rows:,} rows on {platform.machine()}, {os.cpu_count()} cores\n")
        print("| step | time | peak memory |\n|---|---|---|")
        print(run("curate", "curate", recipe, "--data", root / "data", "--out", corpus, "--embed"), flush=True)
        print(run("synthesize --teacher rules", "synthesize", corpus, "--teacher", "rules"), flush=True)
        print(run("corpus stats", "corpus", "stats", corpus), flush=True)
        print(run("corpus check", "corpus", "check", corpus), flush=True)
        print(run("corpus export", "corpus", "export", corpus, "--layout", "guardreasoner", "--out", root / "out"))
        size = (corpus / "rows.parquet").stat().st_size / 2**30
        print(f"\nrows.parquet, images inside: {size:.2f} GB")


if __name__ == "__main__":
    main()
