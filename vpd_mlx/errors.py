"""Every error that a user can meet, in one tree.

An error says the value received, the place and the remedy, in one line. The command line prints `str(error)` and exits
with `exit_code`; nothing else decides how an error ends.

    VpdError            2  every error that the user can fix
    |-- ConfigError     2  a recipe, a flag or an argument; it carries all its faults (`Fault`)
    |-- DataError       2  a data file
    |-- ModelError      2  a model that cannot be found, loaded or adapted
    |-- SourceError     3  a verifier or a feedback source that fails
    `-- RunError        3  a run that cannot start, go on or be read
"""

from __future__ import annotations

from dataclasses import dataclass

from vpd_mlx.common.text import one_line

__all__ = [
    "ConfigError",
    "DataError",
    "Fault",
    "ModelError",
    "RunError",
    "SourceError",
    "VpdError",
    "config_error",
    "wrong_option",
]


class VpdError(Exception):
    """Base of all errors that the user can fix. A message may quote a file or a server; it stays one line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe: where, what was received, what helps."""

    path: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.problem}; {self.remedy}")


class ConfigError(VpdError):
    """A recipe, a `--set` or a flag is wrong. Carries all the faults that were found, not just the first."""

    def __init__(self, faults: list[Fault], where: str = "recipe") -> None:
        self.faults = faults
        self.where = where
        lines = "".join(f"\n  {fault}" for fault in faults)  # several faults stand on lines of their own
        text = f" {faults[0]}" if len(faults) == 1 else f" {len(faults)} faults{lines}"
        Exception.__init__(self, f"{one_line(where)}:{text}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Fault], str]]:
        return type(self), (self.faults, self.where)


def config_error(path: str, problem: str, remedy: str, where: str = "recipe") -> ConfigError:
    """The error of a single fault."""
    return ConfigError([Fault(path, problem, remedy)], where)


def wrong_option(name: str, problem: str, remedy: str) -> ConfigError:
    """A single fault of the command line."""
    return config_error(name, problem, remedy, "command line")


class DataError(VpdError):
    """A data file is missing, empty, broken or does not fit the recipe."""


class ModelError(VpdError):
    """A model cannot be found, loaded, or adapted as the recipe asks."""


class SourceError(VpdError):
    """A verifier or a feedback source failed: never the model's fault, never a score of 0."""

    exit_code = 3


class RunError(VpdError):
    """A run cannot start, go on or be read: folder taken, disk full, numbers not finite."""

    exit_code = 3
