"""DAPO-Math-17k and MATH-500 in one form, {"prompt", "answer"}, without duplicates, within or between the two.

    python prepare.py train-00000-of-00001.parquet test.jsonl data

Needs pyarrow: pip install 'vpd-mlx[parquet]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The rows of a Parquet or JSONL file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def convert(rows: list[dict], prompt: str, answer: str, taken: set[str]) -> list[dict]:
    """Rows in this recipe's form; skips prompts in `taken`, regardless of white space, and adds the others to it."""
    out = []
    for row in rows:
        key = " ".join(row[prompt].split())
        if key and key not in taken:
            taken.add(key)
            out.append({"prompt": row[prompt].strip(), "answer": str(row[answer]).strip()})
    return out


def main() -> None:
    """Read both sets, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dapo", type=Path, help="open-r1/DAPO-Math-17k-Processed, en/train-00000-of-00001.parquet")
    parser.add_argument("math500", type=Path, help="HuggingFaceH4/MATH-500, test.jsonl")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    taken: set[str] = set()
    held = convert(read(args.math500), "problem", "answer", taken)  # first, so that a problem in both is held out
    train = convert(read(args.dapo), "prompt", "solution", taken)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", held)):
        path = args.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    main()
