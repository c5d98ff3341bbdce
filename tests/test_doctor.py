"""The self-test holds here, and catches what is wrong."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from fakes import tiny_policy
from typer.testing import CliRunner

from vpd_mlx import losses
from vpd_mlx.commands.app import app
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.heads import weighted_token_loss
from vpd_mlx.tools import doctor, selftest


def names_of_bad() -> list[str]:
    return [c.name for c in doctor.self_test()[0] if not c.ok]


def test_everything_holds_here_and_quickly():
    checks, seconds = doctor.self_test()
    assert [c.name for c in checks if not c.ok] == []
    assert len(checks) > 25
    assert seconds < 30
    for part in (
        "divergence",
        "BCO",
        "policy gradient",
        "LoRA on quantised layers",
        "fused head",
        "AdamW",
        "sampled",
        "shared",
    ):
        assert any(part in c.name for c in checks), part


def silent(f):
    """f with a vjp that returns zero: values right, nothing learned. What mlx-lm's tuner losses do on Metal."""
    planted = mx.custom_function(f)

    @planted.vjp
    def _(primals, _cotangents, _outputs):
        return mx.zeros_like(primals) if isinstance(primals, mx.array) else [mx.zeros_like(p) for p in primals]

    return planted


def test_a_gradient_that_is_silently_zero_is_caught(monkeypatch):
    real = losses.divergence
    monkeypatch.setattr(losses, "divergence", lambda s, t, **k: silent(lambda x: real(x, t, **k))(s), raising=True)
    bad = names_of_bad()
    assert sum("divergence" in name and "differences" in name for name in bad) >= 9
    assert not any("BCO" in name for name in bad)


def test_a_wrong_kernel_on_the_device_is_caught(monkeypatch):
    # On the default device the value comes out a little off; the CPU's is right.
    real, calls = selftest._value_and_grad, []

    def off(f, parameters, device):
        calls.append(device)
        value, gradient = real(f, parameters, device)
        return (value * 1.05, gradient) if len(calls) % 2 else (value, gradient)

    monkeypatch.setattr(selftest, "_value_and_grad", off)
    assert sum("against CPU" in name for name in names_of_bad()) >= 10


def test_tf32_is_noticed_and_allowed_for(monkeypatch):
    """Inputs rounded to ten bits of mantissa, as a GPU may do unasked: the product is less exact, and so may be what follows."""
    assert selftest._tolerance() == selftest.DEVICE_TOLERANCE
    real = mx.matmul

    def rounded(x: mx.array, bits: int) -> mx.array:
        return mx.view(mx.view(x, mx.uint32) & mx.array(0xFFFFFFFF << (23 - bits) & 0xFFFFFFFF, mx.uint32), mx.float32)

    monkeypatch.setattr(mx, "matmul", lambda a, b: real(rounded(a, 10), rounded(b, 10)))
    assert selftest._tolerance() == selftest.TF32_TOLERANCE
    monkeypatch.setattr(mx, "matmul", lambda a, b: real(rounded(a, 3), rounded(b, 3)))
    assert selftest._tolerance() == selftest.DEVICE_TOLERANCE  # that is no TF32 but wrong


def test_not_a_number_is_caught(monkeypatch):
    real = losses.bco_loss
    monkeypatch.setattr(losses, "bco_loss", lambda *a, **k: (real(*a, **k)[0] * float("nan"), real(*a, **k)[1]))
    assert all("BCO" in name for name in names_of_bad())
    assert len(names_of_bad()) == 3


def test_a_wrong_analytic_gradient_is_caught(monkeypatch):
    """What the E-step weights its backward pass by is no autodiff: it may go wrong on its own."""
    real = losses.bco_gradient
    monkeypatch.setattr(losses, "bco_gradient", lambda *a, **k: -real(*a, **k))
    assert names_of_bad() == ["BCO's analytic gradient against autodiff"]


def test_a_broken_prefix_is_caught(monkeypatch):
    from vpd_mlx.engine import caches

    real = caches.Extend.__init__

    def shifted(self, prompt, parents, lengths):
        real(self, prompt, parents, lengths + 3)

    alone = caches.Behind.__init__

    def shifted_alone(self, *args, **kwargs):
        alone(self, *args, **kwargs)
        self.offset += 3

    assert names_of_bad() == []
    monkeypatch.setattr(caches.Extend, "__init__", shifted)
    monkeypatch.setattr(caches.Behind, "__init__", shifted_alone)
    # The self-test shares prompts whatever the probe at load says, and that would not have used it.
    assert any("shared prompts" in name for name in names_of_bad())
    policy = tiny_policy()
    assert not policy.shares_prompts
    assert any("cannot share" in note for note in policy.notes)


def test_the_command(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("python", "mlx-lm", "memory", "disk free", "sandbox", "self-test"):
        assert word in result.output
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert all(c["ok"] for c in json.loads(result.output)["checks"])
    real = losses.entropy
    assert real is losses.entropy
    monkeypatch.setattr(selftest, "DEVICE_TOLERANCE", -1.0)
    failing = CliRunner().invoke(app, ["doctor"])
    assert failing.exit_code == 1
    assert "WRONG" in failing.output


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_and_custom_gradient_equal_plain_autograd(chunk):
    matrix = mx.random.normal((50, 16), key=mx.random.key(0))
    hidden, teacher = (mx.random.normal((7, 16), key=mx.random.key(i)) for i in (1, 2))
    weights = mx.random.normal((7,), key=mx.random.key(3))

    def head(h):
        return h @ matrix.T

    def fused(h):
        def per_token(student, fixed, apply):
            loss = losses.divergence_of(student, Softmax.of(apply(fixed["t"])), alpha=0.3)
            return loss, {"twice": mx.stop_gradient(2 * loss)}

        return weighted_token_loss(head, per_token, h, weights, {"t": teacher}, chunk)

    def plain(h):
        pair = losses.log_softmax(head(h)), losses.log_softmax(head(teacher))
        return (losses.divergence_from_logps(*pair, alpha=0.3) * weights).sum()

    (value, columns), gradient = mx.value_and_grad(fused)(hidden)
    want, want_gradient = mx.value_and_grad(plain)(hidden)
    assert value.item() == pytest.approx(want.item(), abs=1e-5)
    assert mx.abs(gradient - want_gradient).max().item() < 1e-5
    assert mx.allclose(columns["twice"], 2 * columns["loss"]).item()
    assert columns["loss"].shape == (7,)
