"""LiveCodeBench's rows in this recipe's form: statement, starter code and instructions in one prompt.

    python prepare.py test6.jsonl data/rows.jsonl [--since 2025-02-01]

Tests stay as they are: the code task reads them in LiveCodeBench's own form.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

KEPT = ("public_test_cases", "private_test_cases", "metadata", "difficulty", "contest_date", "platform")
STDIN = "Read from standard input and write to standard output."
STARTER = "Complete this code:\n\n```python\n{code}\n```"
FORM = "Think it through, then write the whole program in one ```python block at the end."


def convert(row: dict) -> dict:
    """One row of LiveCodeBench as one of this recipe's."""
    starter = row.get("starter_code") or ""
    how = STARTER.format(code=starter.rstrip()) if starter.strip() else STDIN
    return {
        "id": row["question_id"],
        "prompt": f"{row['question_content'].strip()}\n\n{how}\n\n{FORM}",
        **{key: row[key] for key in KEPT if key in row},
    }


def main() -> None:
    """Read the rows, write those since the date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--since", default="", help="leave older contests out, e.g. 2025-02-01")
    args = parser.parse_args()
    with args.source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    chosen = [convert(r) for r in rows if str(r.get("contest_date", "")) >= args.since]
    args.target.parent.mkdir(parents=True, exist_ok=True)
    args.target.write_text("".join(json.dumps(r) + "\n" for r in chosen), encoding="utf-8")
    print(f"{args.target}: {len(chosen)} of {len(rows)} problems")


if __name__ == "__main__":
    main()
