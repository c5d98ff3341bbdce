"""`vpd-mlx export`: a run's adapter for other tools."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vpd_mlx.errors import ConfigError, Fault

__all__ = ["export"]

BITS = (2, 3, 4, 5, 6, 8)
GGUF_BITS = (16, 8)
GROUP_SIZES = (32, 64, 128)
Format = StrEnum("Format", ["adapters", "fused", "peft", "gguf", "hub"])  # what to write


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[
        Format,
        typer.Option(
            help="mlx-lm adapters, a fused model, PEFT adapters, a GGUF file for LM Studio, Ollama and llama.cpp, "
            "or adapters uploaded to the hub."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="RUN/export-<format>")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="fused: quantise again to this many bits. gguf: 16, or 8. Can lose what was learned."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="fused: group size of that quantisation.", show_default="64")
    ] = None,
    converter: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp's convert_hf_to_gguf.py, where it is not on the path.")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="hub: owner/name.")] = None,
    private: Annotated[bool, typer.Option(help="hub: make the repository private.")] = True,
) -> None:
    """Export a run's result for mlx-lm, transformers or the hub. The export is loaded back and compared with the run."""
    faults = _faults(to, bits, group_size, repo, converter)
    if faults:
        raise ConfigError(faults, "command line")
    from vpd_mlx.tools.export import check_empty, export_adapters, export_fused, export_peft, open_run, reserve, upload
    from vpd_mlx.tools.gguf import export_gguf, find_converter

    program = find_converter(converter) if to is Format.gguf else []
    target = out if out is not None else run / f"export-{to.value}"
    if repo is not None:
        reserve(repo, private=private)
        if out is None and target.exists():
            shutil.rmtree(target)  # our own, from an earlier upload
    check_empty(target)
    source = open_run(run)
    if to is Format.fused:
        done = export_fused(source, target, bits=bits, group_size=group_size or 64)
    elif to is Format.peft:
        done = export_peft(source, target)
    elif to is Format.gguf:
        done = export_gguf(source, target, program, bits)
    else:
        done = export_adapters(source, target)
    typer.echo(f"written: {done.folder}")
    apart = f"largest difference {done.difference:.2g}, KL to the trained model {done.kl:.2g} nats a token"
    typer.echo(f"loaded back: {apart}")
    if done.asked:
        typer.echo(done.asked)
    if done.warning:
        typer.echo(f"warning: {done.warning}", err=True)
    if repo is not None:
        typer.echo(f"uploaded: {upload(target, repo)}")
    for command in done.commands:
        typer.echo(f"try it: {command}")


def _faults(
    to: Format, bits: int | None, group_size: int | None, repo: str | None, converter: str | None
) -> list[Fault]:
    """Options that do not go together, and what MLX cannot quantise to."""
    if to is Format.hub and repo is None:
        return [Fault("--repo", "is missing", "name the repository: --repo owner/name")]
    faults = []
    for flag, value, its, known in (
        ("--bits", bits, (Format.fused, Format.gguf), GGUF_BITS if to is Format.gguf else BITS),
        ("--group-size", group_size, (Format.fused,), GROUP_SIZES),
        ("--repo", repo, (Format.hub,), ()),
        ("--converter", converter, (Format.gguf,), ()),
    ):
        if value is not None and to not in its:
            use = " or ".join(i.value for i in its)
            faults.append(Fault(flag, f"means nothing with --to {to.value}", f"use it with --to {use}"))
        elif value is not None and known and value not in known:
            who = "the converter cannot write" if to is Format.gguf else "MLX cannot quantise by"
            faults.append(Fault(flag, f"{who} {value}", f"use one of {', '.join(map(str, known))}"))
    if to is Format.fused and group_size is not None and bits is None:
        faults.append(Fault("--group-size", "means nothing without --bits", "give --bits as well"))
    return faults
