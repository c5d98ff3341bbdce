"""Sampling: the same draws by either way of decoding, and prompts divided among threads."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from fakes import tiny_policy

from vpd_mlx.engine import sampling as rollout
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Finished, Sampling, _continuous, default_streams, generate
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.step import Trainer

MODEL = Path(__file__).parent.parent / "recipes" / "quickstart" / "model"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [tuple(rng.randrange(1, policy.vocabulary - 1) for _ in range(n)) for n in (2, 17, 5, 29, 5, 3)]


def in_order(found: Any) -> list[Finished]:
    return sorted(found, key=lambda at: at[:2])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_all_rows_at_once_draw_what_mlx_lm_draws(
    policy: Policy, prompts: list[tuple[int, ...]], temperature: float, top_p: float
):
    """Tokens, log-probabilities and reasons, for prompts of different lengths and rows that end at different times."""
    import mlx.core as mx

    how = Sampling(temperature, top_p, 12)
    ours = in_order(generate(policy, prompts, 4, how, 5))
    mx.random.seed(5)
    theirs = in_order(x for finished in _continuous(policy, prompts, 4, how, 24) for x in finished)
    assert ours == theirs
    assert len({len(r.tokens) for *_, r in ours}) > 1
    assert {r.finish for *_, r in ours} == {"stop", "length"}


def test_fewer_places_than_rows_still_give_every_row(policy: Policy, prompts: list[tuple[int, ...]]):
    found = in_order(generate(policy, prompts, 3, Sampling(1.0, 1.0, 6, rows=4), 1))
    assert [at[:2] for at in found] == [(p, n) for p in range(len(prompts)) for n in range(3)]


@pytest.mark.parametrize("samples", [1, 3])
def test_threads_give_every_row_the_same_draws_each_time(policy: Policy, prompts: list[tuple[int, ...]], samples: int):
    two = Sampling(1.0, 1.0, 8, streams=2)
    found = in_order(generate(policy, prompts, samples, two, 7))
    assert [at[:2] for at in found] == [(p, n) for p in range(len(prompts)) for n in range(samples)]
    assert found == in_order(generate(policy, prompts, samples, two, 7))
    assert found != in_order(generate(policy, prompts, samples, Sampling(1.0, 1.0, 8), 7))
    first = in_order(generate(policy, prompts[:3], samples, Sampling(1.0, 1.0, 8), 7))
    assert found[: 3 * samples] == first  # a part draws by its own seed, whatever the others do
    again = in_order(generate(policy, prompts[:1] * 2, 8, two, 7))
    assert again[:8] != again[8:]  # the same prompt in another thread draws otherwise


def idle() -> bool:
    """Whether the decoding threads wait for something to do, within a second at most."""
    until = time.monotonic() + 1
    while any(d.working for d in rollout._decoders) and time.monotonic() < until:
        time.sleep(0.001)
    return not any(d.working for d in rollout._decoders)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_threads_are_used_again(policy: Policy, prompts: list[tuple[int, ...]]):
    """mlx keeps one for each thread that ever computed: with new ones for every call, a long run is slower and slower."""
    counts = []
    for _ in range(4):
        list(generate(policy, prompts, 1, Sampling(1.0, 1.0, 2, streams=2), 0))
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    assert counts[-1] <= counts[0]


def test_an_error_in_a_thread_is_raised_and_no_thread_works_on(
    policy: Policy, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    how = Sampling(1.0, 1.0, 400, streams=2)
    for finished in generate(policy, prompts, 2, how, 0):
        assert finished[2].tokens
        break  # whoever asks loses interest: the threads end with their next token
    assert idle()
    monkeypatch.setattr(rollout, "_read", lambda *_: (_ for _ in ()).throw(ValueError("cannot read")))
    with pytest.raises(ValueError, match="cannot read"):
        list(generate(policy, prompts, 2, how, 0))
    assert idle()


def test_the_recipe_says_how_many_threads(small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    from vpd_mlx.common.stats import Clock

    monkeypatch.delenv("VPD_MLX_GPU_PATHS", raising=False)
    model = Trainer.build(small()).policy.model  # on the CPU that tests run on
    assert default_streams(model) == 2
    assert default_streams(nn.Linear(4, 4)) == 1
    asked: list[int] = []
    real = rollout._side_by_side

    def side_by_side(policy, prompts, samples, how, seed, parts):
        asked.append(parts)
        return real(policy, prompts, samples, how, seed, parts)

    monkeypatch.setattr(rollout, "_side_by_side", side_by_side)
    texts = []
    for streams, parts in ((None, 2), (3, 3), (1, None)):
        asked.clear()
        trainer = Trainer.build(small(memory__rollout_streams=streams))
        batch, _ = trainer.roll_out(1, Clock())
        texts.append([r.text for r in batch.rollouts])
        assert asked == ([] if parts is None else [parts])
    assert texts[0] != texts[1] != texts[2]


def test_a_process_whose_threads_decoded_ends_well():
    """mlx's streams of a thread must be gone before the thread is: else the process may abort at its end."""
    code = (
        "from vpd_mlx.engine.policy import Policy; from vpd_mlx.engine.sampling import Sampling, generate\n"
        f"policy = Policy.load({str(MODEL)!r}, None)\n"
        "print(len(list(generate(policy, [(1, 2), (3, 4), (5, 6)], 4, Sampling(1.0, 1.0, 9, streams=2), 0))))"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")
