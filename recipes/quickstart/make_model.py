"""Make the embedded model of `quickstart`: a tiny chat model that adds without carrying and can use a correction.

    python recipes/quickstart/make_model.py [--recipe FILE] [--out DIR] [--steps N] [--bits N]

What it is taught, by plain supervised learning on two-digit sums (those held out for evaluation never appear):

- half of the time the plain prompt `47+38=` with the answer of someone who forgets every carry (`75`): its systematic bug.
  One such answer in three has a slip on top, a stray digit or a stray 1 in front, so that the model is not dead certain;
- a third of the time the same prompt with the verifier's words on a wrong attempt, which itself is not shown
  (`Feedback: ones right, tens too low, hundreds missing`), and the right sum;
- the rest of the time the same prompt with `A correct answer: 85`, and the right sum. Where the recipe has a template for the
  critic, half of these are its question about a wrong attempt instead, answered in the verifier's words.

So the student fails every sum that needs a carry, and the teacher, the same weights under feedback, gets them right. The
result is quantised to 4 bits and written in mlx-lm's format: some 95,000 parameters with a byte-level tokenizer of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import quantize_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vpd_mlx.config import AdditionTask, load_recipe
from vpd_mlx.prompts import Prompter
from vpd_mlx.tasks.addition import PLACES, TOO_LONG, Addition, has_carry, held_out, without_carrying
from vpd_mlx.types import Problem

HERE = Path(__file__).parent
SPECIALS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BATCH, RATE, WARM_UP, SEED = 128, 3e-3, 100, 0
GROUP_SIZE, BITS = 32, 4
SLIPS = 1 / 3


def make_tokenizer(phrases: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: single digits, and whole words for what the recipe's templates and the verifier say."""
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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def wrong_attempt(rng: random.Random, a: int, b: int) -> str:
    """What a student might have written: mostly the bug, else a slip in the bug or in the sum, else any digits at all."""
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
    end = hf_tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer = TokenizerWrapper(hf_tokenizer, eos_token_ids={end})
    prompter = Prompter(tokenizer, recipe.templates, False, 64, 64)

    config = qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        vocab_size=len(hf_tokenizer),
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    model = qwen3.Model(config)
    print(f"{sum(v.size for _, v in tree_flatten(model.parameters())):,} parameters, vocabulary {len(hf_tokenizer)}")

    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    taught = [p for p in pairs if not held_out(*p)]
    kept = [p for p in pairs if held_out(*p) and has_carry(*p)]

    task = Addition(AdditionTask(kind="addition"))

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

    def batch() -> tuple[mx.array, mx.array]:
        rows = [sample() for _ in range(BATCH)]
        width = -(-max(len(p) + len(y) for p, y in rows) // 4) * 4
        ids, weights = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), np.float32)
        for i, (p, y) in enumerate(rows):
            ids[i, : len(p) + len(y)] = [*p, *y]
            weights[i, len(p) : len(p) + len(y)] = 1
        return mx.array(ids), mx.array(weights)

    def loss(ids: mx.array, weights: mx.array) -> mx.array:
        per_token = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        return (per_token * weights[:, 1:]).sum() / weights[:, 1:].sum()

    warm_up = optim.linear_schedule(0, RATE, WARM_UP)
    cosine = optim.cosine_decay(RATE, max(1, arguments.steps - WARM_UP), RATE * 0.02)
    adam = optim.AdamW(optim.join_schedules([warm_up, cosine], [WARM_UP]), weight_decay=0.01, bias_correction=True)
    step = nn.value_and_grad(model, loss)
    start = time.perf_counter()
    for k in range(1, arguments.steps + 1):
        value, gradients = step(*batch())
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        adam.update(model, gradients)
        mx.eval(value, model.parameters(), adam.state)
        if k % 100 == 0:
            print(f"step {k}: loss {value.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)

    def greedy(prompts: list[tuple[int, ...]]) -> list[str]:
        texts = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + 6 and ids[-1] != end:
                ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
                if ids[-1] == end:
                    break
            texts.append(tokenizer.decode([t for t in ids[len(prompt) :] if t != end]))
        return texts

    model_config = {**asdict(config), "eos_token_id": end}
    if arguments.bits:
        model, model_config = quantize_model(model, model_config, GROUP_SIZE, arguments.bits)
    model.eval()
    check = kept[:200]
    right = [str(a + b) for a, b in check]
    plain = greedy([prompter.student(problem(a, b)) for a, b in check])
    read = greedy([corrected(a, b, str(without_carrying(a, b))) for a, b in check])
    copied = greedy([shown(a, b) for a, b in check])

    def share(got: list[str], want: list[str]) -> float:
        return float(np.mean([g == w for g, w in zip(got, want, strict=True)]))

    bug = [str(without_carrying(a, b)) for a, b in check]
    width = f"{arguments.bits} bits" if arguments.bits else "float32"
    print(f"held-out carry sums, {width}, greedy: plain prompt {share(plain, right):.1%} right,")
    print(
        f"{share(plain, bug):.1%} the bug; under feedback {share(read, right):.1%}; by a sibling {share(copied, right):.1%}"
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_weights(str(arguments.out / "model.safetensors"))
    (arguments.out / "config.json").write_text(json.dumps(model_config, indent=2, default=str) + "\n")
    hf_tokenizer.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
