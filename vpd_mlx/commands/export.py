"""`vpd-mlx export`: a run's adapter for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vpd_mlx.errors import ConfigError, Fault

__all__ = ["Format", "export"]


class Format(StrEnum):
    """What to write."""

    adapters = "adapters"
    fused = "fused"
    peft = "peft"
    hub = "hub"


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[Format, typer.Option(help="mlx-lm adapters, a fused model, PEFT adapters, or adapters on the hub.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="RUN/export-<format>")] = None,
    bits: Annotated[
        int | None, typer.Option(help="fused: quantise again to so many bits. Can lose what was learned.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="fused: group size of that quantisation.")] = 64,
    repo: Annotated[str | None, typer.Option(help="hub: owner/name.")] = None,
    private: Annotated[bool, typer.Option(help="hub: make the repository private.")] = True,
) -> None:
    """Write a run's result for mlx-lm, transformers or the hub; it is loaded back and compared before it is called done."""
    if to is Format.hub and repo is None:
        raise ConfigError([Fault("--repo", "is missing", "name the repository: --repo owner/name")], "command line")
    if bits is not None and to is not Format.fused:
        raise ConfigError([Fault("--bits", f"means nothing for {to.value}", "use it with --to fused")], "command line")
    from vpd_mlx.export import export_adapters, export_fused, export_peft, open_run, upload

    target = out if out is not None else run / f"export-{to.value}"
    source = open_run(run)
    if to is Format.fused:
        done = export_fused(source, target, bits=bits, group_size=group_size)
    elif to is Format.peft:
        done = export_peft(source, target)
    else:
        done = export_adapters(source, target)
    typer.echo(f"written: {done.folder}")
    typer.echo(
        f"loaded back: greatest difference {done.difference:.2g}, KL to the trained model {done.kl:.2g} nats a token"
    )
    if done.warning:
        typer.echo(f"warning: {done.warning}", err=True)
    if to is Format.hub and repo is not None:
        typer.echo(f"uploaded: {upload(target, repo, private=private)}")
    for command in done.commands:
        typer.echo(f"try it: {command}")
