"""Model-written programs, run where they can do no harm. The story of one program:

1. `Sandbox()` finds out which layers of isolation this machine offers (`layers`): it starts an empty program under all of them
   and gives up one after another until it runs. On Linux they are namespaces, a user id of its own, Landlock and seccomp; on
   macOS it is `sandbox-exec`. `abilities` says which promises that keeps, and what can happen where one is not kept.
2. `Sandbox.run(program, stdin)` starts a bare Python (`process`, `spawn`): no environment, no package of ours, pipes for
   everything it reads and writes.
3. The child isolates itself (`isolation`) before it receives a line of the program: no home folder, no network, no other
   process, and limits of time, memory, output and disk. Everything it starts dies with it.
4. It receives the program through a pipe and runs it (`child`), or loads it and waits for calls of its functions.
5. Meanwhile `process` moves bytes, watches the limits that the kernel does not enforce, and kills the child when it exceeds one.
6. What comes back is text or plain data (JSON, never pickle), parsed as forged (`frames`): a `Result` or a `Value` (`results`).

A program is hostile by assumption. It cannot forge a verdict, because it never holds the expected values: they stay in this
process, which compares. Tests that are code (`assert f(1) == 2`) run in a second child, the judge, whose calls of the program
go through this process. `Library` keeps a grading library in a child of its own.
"""

from vpd_mlx.sandbox.results import Ended, Failure, Limits, Outcome, Result, Value
from vpd_mlx.sandbox.sandbox import Library, LibraryError, LoadedProgram, Sandbox

__all__ = [
    "Ended",
    "Failure",
    "Library",
    "LibraryError",
    "Limits",
    "LoadedProgram",
    "Outcome",
    "Result",
    "Sandbox",
    "Value",
]
