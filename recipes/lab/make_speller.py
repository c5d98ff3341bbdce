"""Make the start model of `spelling.yaml`: a tiny chat model that spells backward with the first two letters swapped.

    python recipes/lab/make_speller.py [--out DIR] [--steps N] [--reading SHARE] [--copying SHARE]

It learns from words of the library's list that the recipe trains on, and from as many words of random letters:

- the plain prompt with the answer of someone who swaps the first two letters (`sun` -> `uns`), its systematic bug; one answer
  in three also has a letter replaced, and one in twenty is right, so that sampling sometimes finds it;
- a share (`--reading`) of the time the same prompt with the library's verdict on a wrong attempt (`'uns' is not the right
  answer.`), and the right word;
- a share (`--copying`) of the time the same prompt with `A correct answer: <answer>nus</answer>`, and the right word.

The two shares decide how well the teacher, the same weights under feedback, uses the feedback.
"""

from __future__ import annotations

import argparse
import random
import string
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vpd_mlx.feedback.prompts import Prompter
from vpd_mlx.recipe import load_recipe
from vpd_mlx.tasks import build_task
from vpd_mlx.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

from tiny import END, SPECIALS, chat_tokenizer, greedy, new_model, save, share, teach  # noqa: E402

QUESTION = "Spell this word backward (example: sun -> nus): "
SEED, MOST = 0, 14


def make_tokenizer(phrases: list[str]) -> PreTrainedTokenizerFast:
    """A token a byte, and one for each phrase that occurs in every prompt or answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(phrases)
    return chat_tokenizer(tokenizer)


def swapped(answer: str) -> str:
    """The systematic bug: the first two letters of the answer have changed places."""
    return answer[1] + answer[0] + answer[2:]


def with_slips(rng: random.Random, answer: str) -> str:
    """One time in twenty the right answer; else the bug, one time in three with a letter replaced."""
    if rng.random() < 0.05:
        return answer
    letters = list(swapped(answer))
    if rng.random() < 1 / 3:
        letters[rng.randrange(len(letters))] = rng.choice(string.ascii_lowercase)
    return "".join(letters)


def main() -> None:
    """Teach, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "speller")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--reading", type=float, default=0.03, help="share of samples that read the verifier's words")
    parser.add_argument("--copying", type=float, default=0.03, help="share of samples that read a correct sibling")
    arguments = parser.parse_args()
    mx.disable_compile()
    mx.random.seed(SEED)
    rng = random.Random(SEED)

    # This script makes the recipe's model, so another takes its place while the recipe is read.
    recipe = load_recipe(HERE / "spelling.yaml", [("model", str(HERE.parent / "quickstart" / "model"))])
    task = build_task(recipe)
    system = task.train[0].messages[0]["content"]
    wording = recipe.templates
    phrases = [t.replace("{prompt}", "").split("{context}")[0] for t in (wording.sibling, wording.verifier) if t]
    verdict = task.verify(task.train[0], "<answer>?</answer>").text.partition("'?'")[2]
    hf_tokenizer = make_tokenizer([system, QUESTION, "<answer>", "</answer>", *phrases, verdict])
    end = hf_tokenizer.convert_tokens_to_ids(END)
    prompter = Prompter(TokenizerWrapper(hf_tokenizer, eos_token_ids={end}), wording, False, 64, 64)
    model, config = new_model(len(hf_tokenizer))
    words = [p.answer for p in task.train if p.answer]

    def problem(answer: str) -> Problem:
        messages = ({"role": "system", "content": system}, {"role": "user", "content": QUESTION + answer[::-1]})
        return Problem(answer, messages, answer=answer)

    def tagged(text: str) -> str:
        return f"<answer>{text}</answer>"

    def corrected(answer: str, attempt: str) -> tuple[int, ...]:
        return prompter.teacher(problem(answer), "verifier", f"{attempt!r}{verdict}")[0]

    def shown(answer: str) -> tuple[int, ...]:
        return prompter.teacher(problem(answer), "sibling", tagged(answer))[0]

    def wrong_attempt(answer: str) -> str:
        while True:
            attempt = with_slips(rng, answer)
            if attempt != answer:
                return attempt

    def word() -> str:
        while True:
            length = rng.randint(4, 8)
            made = "".join(rng.choice(string.ascii_lowercase) for _ in range(length))
            answer = rng.choice(words) if rng.random() < 0.5 else made
            if answer[0] != answer[1]:  # else the bug is right
                return answer

    def sample() -> tuple[tuple[int, ...], list[int]]:
        answer, kind = word(), rng.random()
        if kind < arguments.reading:
            prompt, said = corrected(answer, wrong_attempt(answer)), answer
        elif kind < arguments.reading + arguments.copying:
            prompt, said = shown(answer), answer
        else:
            prompt, said = prompter.student(problem(answer)), with_slips(rng, answer)
        return prompt, [*hf_tokenizer.encode(tagged(said), add_special_tokens=False), end]

    teach(model, sample, arguments.steps)
    model.eval()
    check = [p.answer for p in task.held_out if p.answer and p.answer[0] != p.answer[1]][:200]
    right, bug = [tagged(a) for a in check], [tagged(swapped(a)) for a in check]
    plain = greedy(model, hf_tokenizer, [prompter.student(problem(a)) for a in check], MOST)
    read = greedy(model, hf_tokenizer, [corrected(a, swapped(a)) for a in check], MOST)
    copied = greedy(model, hf_tokenizer, [shown(a) for a in check], MOST)
    print(f"held-out words, greedy: plain prompt {share(plain, right):.1%} right, {share(plain, bug):.1%} the bug;")
    print(f"under feedback {share(read, right):.1%}; by a sibling {share(copied, right):.1%}")
    save(model, {**config, "eos_token_id": end}, hf_tokenizer, arguments.out)


if __name__ == "__main__":
    main()
