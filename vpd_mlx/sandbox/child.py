"""The child's side of the sandbox: receive an untrusted program, run it, report to the parent.

The parent starts it by file, after `isolation`, in an interpreter that cannot import this package. Only the standard library is
used, and as little of it as possible, because start-up is most of a small program's time. The parent imports `encode` as well.

A frame to the parent is 4 bytes of length, one letter and a body: `R` ready, `S` a layer of isolation failed, `E` the program
raised, `V` a call's value, `X` a call raised, `C` the judge asks for a call, `T` the outcome of one test.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing typing would take as long as a small program
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vpd_mlx.sandbox.isolation import Spec

__all__ = ["decode", "encode"]

FILE = "<completion>"  # the program's file name in tracebacks
DEEPEST = 100  # how deep a value may be nested
# --- plain values


def encode(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON that keeps its type: a list is an array, and what JSON lacks is `{tag: ...}`.

    Raises:
        TypeError: the value, or something in it, is not plain data.
    """
    if depth > DEEPEST:
        raise TypeError("a value nested too deeply")
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value) if -(2**53) < value < 2**53 else {"i": hex(value)}
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"f": repr(float(value))}
    if isinstance(value, list):
        return [encode(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {"d": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    for kind, tag in ((tuple, "t"), (set, "s"), (frozenset, "z")):
        if isinstance(value, kind):
            return {tag: [encode(v, depth + 1) for v in value]}
    if isinstance(value, bytes | bytearray):
        return {"b": value.hex()}
    if isinstance(value, complex):
        return {"c": [encode(value.real), encode(value.imag)]}
    raise TypeError(f"a {type(value).__name__}, which is not plain data")


def decode(obj: Any, depth: int = 0) -> Any:
    """The value that `encode` wrote, always of a built-in type.

    Raises:
        ValueError: `encode` cannot have written this.
    """
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    if isinstance(obj, list):
        return [decode(v, depth + 1) for v in obj]
    if not isinstance(obj, dict) or len(obj) != 1:
        raise ValueError("not an encoded value")
    ((tag, body),) = obj.items()
    try:
        if tag == "i":
            return int(body, 16)
        if tag == "f":
            return float(body)
        if tag == "b":
            return bytes.fromhex(body)
        if tag == "d":
            return {decode(k, depth + 1): decode(v, depth + 1) for k, v in body}
        items = [decode(v, depth + 1) for v in body]
        if tag == "c":
            return complex(*items)
        return {"t": tuple, "s": set, "z": frozenset}[tag](items)
    except (KeyError, TypeError) as error:
        raise ValueError("not an encoded value") from error


# --- frames


def send(fd: int, letter: bytes, body: bytes = b"") -> None:
    """Write one frame."""
    data = (len(body) + 1).to_bytes(4, "big") + letter + body
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> bytes:
    """Read one block. Ends the process if the parent is gone."""
    return _exactly(fd, int.from_bytes(_exactly(fd, 4), "big"))


def _exactly(fd: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 16))
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def describe(error: BaseException) -> bytes:
    """`type \\0 line \\0 message` of an error, with the last line of the program itself, or 0."""
    try:
        message = str(error)
    except BaseException:  # noqa: BLE001 - the program's own __str__
        message = ""
    _, line = last_line(error, FILE)
    if isinstance(error, SyntaxError) and error.filename == FILE:
        line, message = error.lineno or 0, error.msg
    return f"{type(error).__name__}\0{line}\0{message[:4000]}".encode("utf-8", "backslashreplace")


def last_line(error: BaseException, *files: str) -> tuple[str, int]:
    """File and line of the traceback's last entry that is in one of `files`, or ("", 0)."""
    place = ("", 0)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in files:
            place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return place


# --- running


def load(name: str, prelude: str, source: str) -> dict[str, Any]:
    """Run a program as the module `name` and return its names."""
    module = type(sys)(name)
    sys.modules[name] = module
    if prelude:
        exec(compile(prelude, "<prelude>", "exec"), module.__dict__)
    exec(compile(source, FILE, "exec"), module.__dict__)
    return module.__dict__


def run(spec: Spec, prelude: str, source: str) -> int:
    """Run a whole program, from standard input to standard output."""
    try:
        load("__main__", prelude, source)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - report anything the program raises
        send(spec.res, b"E", describe(error))
        own = error.__traceback__
        while own is not None and own.tb_frame.f_code.co_filename != FILE:
            own = own.tb_next
        sys.__excepthook__(type(error), error.with_traceback(own), own)
        return 1
    return 0


def serve(spec: Spec, prelude: str, source: str) -> int:
    """Load a program, then answer calls of its functions until the parent closes the pipe."""
    import json

    try:
        names = load("completion", prelude, source)
    except BaseException as error:  # noqa: BLE001
        send(spec.res, b"E", describe(error))
        return 1
    send(spec.res, b"V", b"null")
    while True:
        name, args, kwargs = json.loads(receive(spec.ctl))
        try:
            function = names[name] if name in names else getattr(names["Solution"](), name)
            value = function(*[decode(a) for a in args], **{k: decode(v) for k, v in kwargs.items()})
            try:
                encoded = encode(value)
            except TypeError as error:
                encoded = {"o": [str(error), bool(value)]}  # of an object, only its truth
            body = json.dumps(encoded).encode()
        except BaseException as error:  # noqa: BLE001
            send(spec.res, b"X", describe(error))
        else:
            send(spec.res, b"V", body)


class CallFailed(Exception):
    """The program under test raised an exception that only the parent knows."""


class Opaque:
    """An object that the program returned, as the tests see it: true or false, and good for nothing else."""

    def __init__(self, words: str, truth: bool) -> None:
        self._words, self._truth = words, truth

    def __bool__(self) -> bool:
        return self._truth

    def __eq__(self, other: object) -> bool:
        raise TypeError(self._words)

    __hash__ = None  # type: ignore[assignment]


def judge(spec: Spec, prelude: str, source: str) -> int:
    """Run tests, with the expected values in them. The parent carries out their calls of the program under test."""
    import builtins
    import json

    plan = json.loads(source)
    calls = 0

    def proxy(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            words = [name, [encode(a) for a in args], {k: encode(v) for k, v in kwargs.items()}]
            send(spec.res, b"C", json.dumps(words).encode())
            calls += 1
            answer = receive(spec.ctl)
            if answer[:1] != b"V":
                # A test may expect this exception. One that ends a loop would let all(map(f, ...)) pass.
                kind = getattr(builtins, answer[1:].decode(), CallFailed)
                fine = isinstance(kind, type) and issubclass(kind, Exception)
                raise kind() if fine and not issubclass(kind, StopIteration | StopAsyncIteration) else CallFailed()
            value = json.loads(answer[1:])
            return Opaque(*value["o"]) if isinstance(value, dict) and "o" in value else decode(value)

        return call

    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(prelude, "<prelude>", "exec"), names)
    exec(compile(plan["setup"], "<setup>", "exec"), names)
    for alias, name in plan["names"].items():
        names[alias] = proxy(name)
    for test in plan["tests"]:
        calls = 0
        outcome: dict[str, Any] = {"ok": True}
        try:
            exec(compile(test, "<test>", "exec"), names)
        except Exception as error:  # noqa: BLE001 - the verdict, or a mistake in the test
            at = last_line(error, "<setup>", "<test>")
            outcome = {"ok": False, "why": describe(error).decode(), "called": calls > 0, "at": at}
        send(spec.res, b"T", json.dumps(outcome).encode())
    return 0


def main(spec: Spec, isolate: Callable[[Spec], str]) -> int:
    """Isolate this process, then fetch the program and run it."""
    fault = isolate(spec)
    if fault:
        send(spec.res, b"S", fault.encode())
        return 70
    prelude, source = receive(spec.ctl).decode(), receive(spec.ctl).decode()
    sys.path += spec.path
    sys.argv = ["completion.py"]
    sys.set_int_max_str_digits(50_000)
    send(spec.res, b"R")
    return {"run": run, "serve": serve, "judge": judge}[spec.mode](spec, prelude, source)
