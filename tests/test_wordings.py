"""What the teacher reads: every style's prompts, their place, and what gives way when they are too long."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import ByteTokenizer, Chat

from vpd_mlx.common.settings import parse_set
from vpd_mlx.errors import ConfigError
from vpd_mlx.feedback.prompts import Prompter, Templates
from vpd_mlx.feedback.wordings import COMMON, STYLES
from vpd_mlx.recipe import RECIPE_VERSION, Recipe, builtin_recipes, dump, load_recipe
from vpd_mlx.types import Problem

MINIMAL = "name: x\nmodel: ./m\ntask: {kind: addition}\n"
PROBLEM = Problem("p", ({"role": "user", "content": "Name a prime."},))
WITH_SYSTEM = Problem("s", ({"role": "system", "content": "Be brief."}, *PROBLEM.messages))
CONTEXTS = ("sibling", "verifier", "critique", "reference", "review")


def prompter(tokenizer: Any = None, prompt: int = 2048, context: int = 1024, **templates: Any) -> Prompter:
    return Prompter(tokenizer or Chat(), Templates(**templates), False, prompt, context, prompt)


def shown(how: Prompter, kind: str, context: str, problem: Problem = PROBLEM, **more: Any) -> str:
    return bytes(how.teacher(problem, kind, context, **more)[0]).decode()


@pytest.mark.parametrize(
    ("style", "sibling", "verifier"),
    [
        (
            "after",
            "<user>Name a prime.\n\nA correct answer:\n7<assistant>",
            "<user>Name a prime.\n\nWhat a checker said of a wrong answer:\n7<assistant>",
        ),
        (
            "before",
            "<user>A hint for what follows, a correct answer: 7\n\nName a prime.<assistant>",
            "<user>A hint for what follows, what a checker said of a wrong answer: 7\n\nName a prime.<assistant>",
        ),
        (
            "exactly",
            "<user>Name a prime.\n\n(A correct answer is: 7)<assistant>",
            "<user>Name a prime.\n\n(A checker said of a wrong answer: 7)<assistant>",
        ),
        (
            "system",
            "<system>A correct answer to the user's message:\n7<user>Name a prime.<assistant>",
            "<system>What a checker said of a wrong answer to the user's message:\n7<user>Name a prime.<assistant>",
        ),
        (
            "closing",
            "<user>Name a prime.\n\nA correct solution of this problem, for your guidance:\n\n7\n\n"
            "Now solve the problem yourself, in the format it asks for.<assistant>",
            "<user>Name a prime.\n\nAn earlier attempt at this problem failed. What the checker said of it:\n\n7\n\n"
            "Solve the problem without that mistake, in the format it asks for.<assistant>",
        ),
        (
            "sdpo",
            "<user>Name a prime.\n\nCorrect solution:\n\n7\n\nSolve the original problem correctly.<assistant>",
            "<user>Name a prime.\n\nFeedback on an attempt of yours that was not successful:\n\n7\n\n"
            "Solve the original problem correctly.<assistant>",
        ),
    ],
)
def test_what_the_teacher_reads(style: str, sibling: str, verifier: str):
    how = prompter(style=style)
    assert shown(how, "sibling", "7") == sibling
    assert shown(how, "verifier", "7") == verifier
    assert how.student(PROBLEM) == tuple(b"<user>Name a prime.<assistant>")


@pytest.mark.parametrize("style", STYLES)
def test_a_style_words_every_context(style: str):
    how = prompter(style=style)
    texts = {kind: shown(how, kind, "CONTEXT", solution="SOLUTION") for kind in (*CONTEXTS, "both")}
    for kind, text in texts.items():
        assert text.count("CONTEXT") == 1
        assert text.count("Name a prime.") == 1
        assert ("SOLUTION" in text) == (kind == "both")
        assert "{" not in text
        with_attempt = shown(how, kind, "CONTEXT", solution="SOLUTION", attempt="ATTEMPT")
        assert with_attempt.count("ATTEMPT") == 1
        assert with_attempt.index("ATTEMPT") < with_attempt.index("CONTEXT")
        assert "\n\n\n\n\n" not in with_attempt
    # A success is worded as a success, and what a reviewer says of any answer doesn't give the verdict away.
    assert len({texts[k] for k in ("sibling", "verifier", "critique", "review", "both")}) == 5
    assert not any(word in texts["review"] for word in ("wrong", "failed", "unsuccessful"))


@pytest.mark.parametrize("style", [s for s in STYLES if s != "closing"])
def test_the_teacher_sees_the_whole_message_of_the_student(style: str):
    how = prompter(style=style, student="Think: {prompt} Answer in a box.")
    assert "Think: Name a prime. Answer in a box." in shown(how, "reference", "7")


def test_the_attempt_stands_before_the_feedback_wherever_that_stands():
    def of(style: str, **more: str) -> str:
        return shown(prompter(style=style, attempt="Tried: {attempt}", **more), "verifier", "no", attempt="9")

    assert of("after").startswith("<user>Name a prime.\n\nTried: 9\n\nWhat a checker")
    assert of("before").startswith("<user>Tried: 9\n\nA hint for what follows")
    assert of("system").startswith("<system>Tried: 9\n\nWhat a checker")
    assert of("after", verifier="{prompt} {context} {lead}") == "<user>Name a prime.\n\nTried: 9 no {lead}<assistant>"
    assert of("before", verifier="{context}. {prompt}") == "<user>Tried: 9\n\nno. Name a prime.<assistant>"


def test_braces_in_the_texts_stay():
    how = prompter(style="after")
    text = shown(
        how, "verifier", "use {prompt}", replace(PROBLEM, messages=({"role": "user", "content": "{context}?"},))
    )
    assert text == "<user>{context}?\n\nWhat a checker said of a wrong answer:\nuse {prompt}<assistant>"


def test_the_system_style_appends_to_the_conversations_own_system_message():
    how = prompter(style="system", student="Q: {prompt}")
    text = "<system>Be brief.\n\nA correct answer to the user's message:\n7<user>Q: Name a prime.<assistant>"
    assert shown(how, "sibling", "7", WITH_SYSTEM) == text
    turns = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, *PROBLEM.messages)
    long = shown(how, "sibling", "7", Problem("t", turns))
    assert long.endswith(":\n7<user>Hi.<assistant>Yes?<user>Q: Name a prime.<assistant>")
    plain = prompter(ByteTokenizer(), style="system")
    assert shown(plain, "sibling", "7") == "A correct answer to the user's message:\n7\n\nName a prime.\n"


@pytest.mark.parametrize("style", STYLES)
def test_only_the_context_gives_way(style: str):
    context = "ab" * 300
    how = prompter(prompt=260, style=style)
    ids, cut = how.teacher(WITH_SYSTEM, "sibling", context)
    assert cut
    assert len(ids) <= 260
    text = bytes(ids).decode()
    before, _, after = shown(prompter(style=style), "sibling", "@", WITH_SYSTEM).partition("@")
    assert text.startswith(f"{before}ab")
    assert text.endswith(f"ab{after}")
    assert "\n[...]\n" in text


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}<user>", "refuses"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out"),
    ],
)
def test_a_chat_template_without_system_messages_is_named(template: str, what: str):
    class Bare(Chat):
        chat_template = template

    with pytest.raises(ConfigError, match=f"templates.style: 'system' puts .* which the chat template {what}"):
        prompter(Bare(), style="system").check_style()
    prompter(Bare(), style="after").check_style()
    prompter(Chat(), style="system").check_style()
    prompter(ByteTokenizer(), style="system").check_style()


# --- in a recipe


def recipe_of(folder: Path, extra: str, sets: list[str] | None = None) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(MINIMAL + extra)
    return load_recipe(path, parse_set(sets or []))


def test_a_style_is_named_alone_or_with_templates_of_ones_own(tmp_path: Path):
    assert recipe_of(tmp_path, "").templates.style == "after"
    assert recipe_of(tmp_path, "templates: sdpo").templates == Templates(style="sdpo")
    own = "templates: {style: before, reference: '{context}: {prompt}'}"
    both = recipe_of(tmp_path, own).templates
    assert both.text("reference") == "{context}: {prompt}"
    assert both.text("sibling") == STYLES["before"].texts["sibling"]
    assert recipe_of(tmp_path, own, ["templates=sdpo"]).templates == Templates(style="sdpo")
    assert recipe_of(tmp_path, own, ["templates.style=sdpo"]).templates.reference == "{context}: {prompt}"
    mixed = recipe_of(tmp_path, "templates: sdpo", ["templates.verifier='{prompt} {context}'"]).templates
    assert (mixed.style, mixed.verifier) == ("sdpo", "{prompt} {context}")
    assert "templates:\n  style: sdpo\n" in dump(recipe_of(tmp_path, "templates: sdpo"))


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        (
            "templates: sdop",
            "templates.style: got 'sdop'; did you mean 'sdpo'? There is also after, before, exactly, system, closing",
        ),
        ("templates: {style: sdop}", "templates.style: got 'sdop'; did you mean 'sdpo'?"),
        ("templates: 3", "templates: got 3; needs keys of its own, e.g. templates.style"),
        ("templates: {sibling: '{context}'}", "templates.sibling: lacks {prompt} or {student};"),
        ("templates: {style: system, sibling: '{student}'}", "templates.sibling: lacks {context};"),
        ("templates: {student: '{student}'}", "templates.student: lacks {prompt};"),
        ("templates: {sibling: '{studnt} {prompt} {context}'}", "{studnt} is not a placeholder of this template"),
    ],
)
def test_faults_of_templates(tmp_path: Path, extra: str, fault: str):
    with pytest.raises(ConfigError) as caught:
        recipe_of(tmp_path, extra)
    assert fault in str(caught.value)
    recipe_of(tmp_path, "templates: {style: system, sibling: 'Known: {context}'}")


def test_editors_know_both_forms():
    object_form, name = Recipe.model_json_schema()["$defs"]["Templates"]["anyOf"]
    assert set(name["enum"]) == set(STYLES)
    assert "verifier" in object_form["properties"]


def digest(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode()).hexdigest()


def texts_of(templates: Templates) -> dict[str, str]:
    return {name: templates.text(name) for name in (*COMMON, *STYLES["after"].texts)}


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("quickstart", "0ca4896ac0f4afdf339a95556f9cdc29b432f9e2af85377876dd254623ad3f1d"),
        ("lab/addition", "48a71ac147a95057233fa799d4e62470ac8d0f1225d8dd8c6d79a14a511ffee4"),
        ("lab/spelling", "09e2680c3da8d68a44bf7574a163003a2e14ffd6aa9a3724d8a6b15e58877693"),
    ],
)
def test_recipes_whose_figures_are_published_keep_their_prompts(name: str, sha256: str):
    assert digest(texts_of(load_recipe(builtin_recipes()[name]).templates)) == sha256


def test_a_run_folder_of_version_1_keeps_the_wording_of_then(tmp_path: Path):
    old = load_recipe(Path(__file__).parent / "data" / "old-run" / "config.yaml")
    assert old.templates.style == "closing"
    assert old.templates.verifier == "{prompt}\nFeedback: {context}"
    plain = recipe_of(tmp_path, "version: 1").templates
    assert digest(texts_of(plain)) == "f456d789a0aa1dcb2211a08b97dacaaa4432059eb99b3eb523bb45916c8aad9d"
    assert recipe_of(tmp_path, "version: 1\ntemplates: sdpo").templates.style == "sdpo"
    # What it is read as is written out: it needs no version to be read the same.
    again = tmp_path / "again.yaml"
    again.write_text(dump(old))
    assert load_recipe(again) == old
    assert old.version == RECIPE_VERSION


def test_the_page_lists_every_style():
    page = (Path(__file__).parent.parent / "docs" / "feedback.md").read_text()
    for name, style in STYLES.items():
        assert f"| `{name}` | {style.what} |" in page
