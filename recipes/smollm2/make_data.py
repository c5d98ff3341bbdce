"""Make the rows of the SmolLM2 recipes: four small tasks that differ in kind, 256 problems to train on and 48 held out for each.

    python make_data.py            # writes data/<task>-train.jsonl and data/<task>-test.jsonl beside this file

The same rows on every machine. Every row has `prompt`, `answer` where one answer is right, and `reference`, a correct completion.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TRAIN, TEST = 256, 48
SEED = 5

NAMES = "Anna Ben Carla David Elena Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Robert Sarah Tom Vera"
MONTHS = "January February March April May June July August September October November December"
THINGS = "apples pens books cups chairs lamps shirts boxes tickets stamps plates oranges"
NOUNS = (
    "river lamp stone bird glass window bread clock horse tree letter bridge coat apple garden ship table cup road dog cat boat "
    "door hill book chair"
)

Row = dict[str, Any]


def date(draw: random.Random) -> Row:
    """A date in a sentence, wanted in ISO 8601."""
    month, day, year = draw.randrange(12), draw.randint(1, 28), draw.randint(1950, 2030)
    sentences = ("The meeting is on {}.", "She was born on {}.", "We moved here on {}.", "The shop opens on {}.")
    sentence = draw.choice(sentences).format(f"{MONTHS.split()[month]} {day}, {year}")
    answer = f"{year}-{month + 1:02d}-{day:02d}"
    prompt = f"Write the date in this sentence as YYYY-MM-DD. Write only the date.\n\n{sentence}"
    return {"prompt": prompt, "answer": answer, "reference": answer}


def order(draw: random.Random) -> Row:
    """An order in a sentence, wanted as JSON with two keys."""
    count, thing, month = draw.randint(2, 40), draw.choice(THINGS.split()), draw.choice(MONTHS.split())
    sentences = (
        "Please send me {n} {t} in {m}.",
        "I want to buy {n} {t}, before {m} if you can.",
        "We need {n} {t} by {m}.",
    )
    sentence = draw.choice(sentences).format(n=count, t=thing, m=month)
    answer = json.dumps({"item": thing, "count": count})
    prompt = (
        'Turn the order into JSON with the keys "item" and "count" (a number). Write only the JSON.\n\nOrder: '
        + sentence
    )
    return {"prompt": prompt, "answer": answer, "reference": answer}


def sentence(draw: random.Random) -> Row:
    """A sentence under four conditions that a program can check (`sentences.py`)."""
    a, b = draw.sample(NOUNS.split(), 2)
    prompt = (
        f'Write one short sentence of at most 12 words with the words "{a}" and "{b}" and without commas. '
        "Write only the sentence."
    )
    return {"prompt": prompt, "reference": f"The {a} is near the {b}.", "words": [a, b]}


def total(draw: random.Random) -> Row:
    """A sum of two digits in a story, the answer wanted behind `####`."""
    a, b, name, thing = draw.randint(2, 9), draw.randint(2, 9), draw.choice(NAMES.split()), draw.choice(THINGS.split())
    prompt = (
        f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now? "
        'End with a line "#### " and the number.'
    )
    return {
        "prompt": prompt,
        "answer": str(a + b),
        "reference": f"{name} has {a} + {b} = {a + b} {thing}.\n#### {a + b}",
    }


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "dates": date,
    "orders": order,
    "sentences": sentence,
    "totals": total,
}


def rows(make: Callable[[random.Random], Row], count: int) -> list[Row]:
    """So many rows with different prompts, always the same ones."""
    draw, found = random.Random(SEED), dict[str, Row]()
    while len(found) < count:
        row = make(draw)
        found.setdefault(row["prompt"], row)
    return list(found.values())


def write(path: Path, part: Sequence[Row]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def main() -> None:
    """Write both files of every task."""
    parser = argparse.ArgumentParser(description="Make the rows of the SmolLM2 recipes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder of the files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, make in MAKERS.items():
        made = rows(make, TRAIN + TEST)
        write(out / f"{name}-train.jsonl", made[:TRAIN])
        write(out / f"{name}-test.jsonl", made[TRAIN:])
        print(f"{out / name}-*.jsonl: {TRAIN} + {TEST} rows")


if __name__ == "__main__":
    main()
