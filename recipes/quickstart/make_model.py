"""Make the embedded model of `quickstart`: a tiny chat model that adds without carrying and can use a correction.

    python recipes/quickstart/make_model.py [--recipe FILE] [--out DIR] [--steps N] [--bits N]

It learns two-digit sums by supervised learning. Sums held out for evaluation never appear. Samples are:

- half of the time the plain prompt `47+38=` with the answer of someone who forgets every carry (`75`): its systematic bug.
  One such answer in three also has a slip, a stray digit or a stray 1 in front, so that the model is not entirely certain;
- a third of the time the same prompt with the verifier's words on a wrong attempt, which itself is not shown
  (`Feedback: ones right, tens too low, hundreds missing`), and the right sum;
- the rest of the time the same prompt with `A correct answer: 85`, and the right sum. If the recipe has a template for the
  critic, half of these are the critic's question about a wrong attempt instead, answered in the verifier's words.

So the student fails every sum that needs a carry, and the teacher, the same weights under feedback, gets them right. The
result is quantised to 4 bits and written in mlx-lm's format: some 95,000 parameters with a byte-level tokenizer of its own.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import END, SPECIALS, chat_tokenizer, greedy, new_model, quantise, save, share, teach
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vpd_mlx.feedback.prompts import Prompter
from vpd_mlx.recipe import load_recipe
from vpd_mlx.tasks.addition import PLACES, TOO_LONG, Addition, AdditionSettings, has_carry, held_out, without_carrying
from vpd_mlx.types import Problem

HERE = Path(__file__).parent
SEED, BITS = 0, 4
SLIPS = 1 / 3


def make_tokenizer(phrases: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: single digits, and whole words for those in the recipe's templates and the verifier's feedback."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(phrases, trainer)
    return chat_tokenizer(tokenizer)


def wrong_attempt(rng: random.Random, a: int, b: int) -> str:
    """What a student might have written: mostly the bug, else a slip in the bug or in the sum, else random digits."""
    while True:
        kind = rng.random()
        if kind < 0.4:
            attempt = str(without_carrying(a, b))
        elif kind < 0.7:
            digits = list(str(without_carrying(a, b) if kind < 0.55 else a + b))
            digits[rng.randrange(len(digits))] = str(rng.randrange(10))
            attempt = "".join(digits)
        elif kind < 0.8:
            attempt = f"1{a + b}"
        else:
            attempt = "".join(str(rng.randrange(10)) for _ in range(rng.randint(1, 5)))
        if attempt != str(a + b):  # where there is no carry the bug is right: draw something else that is wrong
            return attempt


def with_slips(rng: random.Random, answer: str) -> str:
    """The answer, or one time in three the answer with a stray digit or a stray 1 in front."""
    kind = rng.random()
    if kind > SLIPS:
        return answer
    if kind < SLIPS / 3:
        return f"1{answer}"
    digits = list(answer)
    digits[rng.randrange(len(digits))] = str(rng.randrange(10))
    return "".join(digits)


def main() -> None:
    """Teach, quantise, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "quickstart.yaml", help="whose templates are taught")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--reading", type=float, default=0.35, help="share of samples that read the verifier's words")
    parser.add_argument("--bits", type=int, default=BITS, help="0 leaves the weights in float32")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    mx.disable_compile()
    mx.random.seed(SEED)
    rng = random.Random(SEED)

    recipe = load_recipe(arguments.recipe)
    words = [f"{place} {word}" for place in PLACES[:4] for word in ("right", "too low", "too high", "missing", "extra")]
    wording = recipe.templates
    templates = [t for t in (wording.sibling, wording.verifier, wording.critique, wording.critic) if t]
    phrases = [
        ", ".join(words),
        TOO_LONG,
        *(re.sub(r"{prompt}|{context}|{attempt}|{answer}", "", t) for t in templates),
    ]
    hf_tokenizer = make_tokenizer(phrases)
    end = hf_tokenizer.convert_tokens_to_ids(END)
    tokenizer = TokenizerWrapper(hf_tokenizer, eos_token_ids={end})
    prompter = Prompter(tokenizer, recipe.templates, False, 64, 64)

    model, config = new_model(len(hf_tokenizer))

    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    taught = [p for p in pairs if not held_out(*p)]
    kept = [p for p in pairs if held_out(*p) and has_carry(*p)]

    task = Addition(AdditionSettings(kind="addition"))

    def problem(a: int, b: int) -> Problem:
        return Problem(f"{a}+{b}", ({"role": "user", "content": f"{a}+{b}="},), answer=str(a + b))

    def answer_ids(text: str) -> list[int]:
        return [*tokenizer.encode(text, add_special_tokens=False), end]

    def corrected(a: int, b: int, attempt: str) -> tuple[int, ...]:
        return prompter.teacher(problem(a, b), "verifier", task.verify(problem(a, b), attempt).text)[0]

    def shown(a: int, b: int) -> tuple[int, ...]:
        return prompter.teacher(problem(a, b), "sibling", str(a + b))[0]

    def sample() -> tuple[tuple[int, ...], list[int]]:
        a, b = rng.choice(taught)
        kind = rng.random()
        if kind < 0.5:
            return prompter.student(problem(a, b)), answer_ids(with_slips(rng, str(without_carrying(a, b))))
        if kind < 0.5 + arguments.reading:
            return corrected(a, b, wrong_attempt(rng, a, b)), answer_ids(str(a + b))
        if wording.critic is not None and kind > 0.925:
            attempt = wrong_attempt(rng, a, b)
            question = prompter.critic(problem(a, b), attempt, "")
            return question, answer_ids(task.verify(problem(a, b), attempt).text)
        return shown(a, b), answer_ids(str(a + b))

    teach(model, sample, arguments.steps)

    model, config = quantise(model, {**config, "eos_token_id": end}, arguments.bits)
    model.eval()
    check = kept[:200]
    right = [str(a + b) for a, b in check]
    plain = greedy(model, hf_tokenizer, [prompter.student(problem(a, b)) for a, b in check], 6)
    read = greedy(model, hf_tokenizer, [corrected(a, b, str(without_carrying(a, b))) for a, b in check], 6)
    copied = greedy(model, hf_tokenizer, [shown(a, b) for a, b in check], 6)
    bug = [str(without_carrying(a, b)) for a, b in check]
    width = f"{arguments.bits} bits" if arguments.bits else "float32"
    print(f"held-out carry sums, {width}, greedy: plain prompt {share(plain, right):.1%} right,")
    print(
        f"{share(plain, bug):.1%} the bug; under feedback {share(read, right):.1%}; by a sibling {share(copied, right):.1%}"
    )

    save(model, config, hf_tokenizer, arguments.out)


if __name__ == "__main__":
    main()
