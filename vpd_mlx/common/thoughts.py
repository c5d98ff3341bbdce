"""Completions without their thinking, whatever tokens a model puts around it.

The marks are those that mlx-lm's tokenizers know (`tokenizer_utils._infer_thinking`), and Magistral's, Seed's and gpt-oss's own.
A chat template may open a thought in the prompt itself: then the completion has the closing mark alone.
"""

from __future__ import annotations

import re

__all__ = ["spoken", "without_thoughts"]

OPEN, CLOSE = "<think>", "</think>"
OTHERS = (
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
CHANNEL, FINAL = "<|channel|>", "<|channel|>final"  # gpt-oss: everything but the channel `final` is thinking
_MESSAGE = re.compile(r"<\|message\|>(.*?)(<\|end\|>|<\|return\|>|<\|start\|>|\Z)", re.DOTALL)
_THOUGHT = re.compile(f"{OPEN}.*?({CLOSE}|\\Z)", re.DOTALL)


def spoken(completion: str) -> str:
    """All after the last thought, and before one that was never closed."""
    return _marked(completion).rpartition(CLOSE)[2].partition(OPEN)[0]


def without_thoughts(completion: str) -> str:
    """All that is not within a thought, stripped."""
    text = _marked(completion)
    opened, closed = text.find(OPEN), text.find(CLOSE)
    if closed >= 0 and not 0 <= opened < closed:
        text = text[closed + len(CLOSE) :]
    return _THOUGHT.sub("", text).strip()


def _marked(text: str) -> str:
    """The text with `<think>` and `</think>` around its thoughts."""
    if CHANNEL in text:
        before, found, answer = text.rpartition(FINAL)
        message = _MESSAGE.search(answer) if found else None
        return f"{OPEN}{before or text}{CLOSE}{message[1]}" if message else OPEN + text
    for start, end in OTHERS:
        if start in text or end in text:
            text = text.replace(start, OPEN).replace(end, CLOSE)
    return text
