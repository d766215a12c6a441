"""The command that lets an adapter write, for a look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora_cli import output


def generate(
    what: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER_DIR", help="A run (folder, name, MLflow or Prefect id), or a folder.")
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What a user says; one answer each.")],
    system: Annotated[str | None, typer.Option(help="What the system says first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time; above: drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens up to this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    with_base: Annotated[bool, typer.Option("--with-base", help="Also what the base alone writes.")] = False,
) -> None:
    """Let a trained adapter answer prompts (task=generation).

    For example: fedlora generate RUN "Define the noun: dog" --with-base
    """
    folder = adapter_of(what)
    output.busy("loading the model …")
    from transformers.utils import logging as transformers_logging

    from fedlora.config.generate import GenerateConfig
    from fedlora.exchange import inference

    transformers_logging.disable_progress_bar()

    how = GenerateConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    found = inference.generate(folder, prompts, how, system, seed, with_base)
    for number, prompt in enumerate(prompts):
        lines = [("prompt", prompt), *((name, found[name][number]) for name in ("base", "adapter") if name in found)]
        blank = "\n" if number else ""
        print(blank + "\n".join(f"{name:<9} {_indented(text)}" for name, text in lines))


def adapter_of(what: str) -> Path:
    """The folder of an adapter: itself, or that of a run, which may be given by its name."""
    from fedlora.exchange.peftfolder import adapter_folder

    found = adapter_folder(Path(what).expanduser())
    if found is None:
        from fedlora.errors import ConfigError
        from fedlora_cli.which_run import folder_of

        run = folder_of(what)
        found = adapter_folder(run)
        if found is None:
            raise ConfigError(
                f"{run} has no adapter yet: the run is not finished; `fedlora resume {run}` goes on with it"
            )
    return found


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 10) or "(nothing)"
