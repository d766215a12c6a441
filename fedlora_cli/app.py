"""The command line: thin, and quick to answer `--help` (heavy imports happen inside the commands)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from deployments.local import environment
from fedlora.config import addresses
from fedlora.errors import ConfigError, FedloraError, counted
from fedlora_cli import bench as cli_bench
from fedlora_cli import datasets as cli_datasets
from fedlora_cli import generate as cli_generate
from fedlora_cli import output
from fedlora_cli import run as cli_run
from fedlora_cli import status as cli_status
from fedlora_cli import sweep as cli_sweep

app = typer.Typer(
    name="fedlora",
    help="Federated LoRA: aggregation strategies, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if version:
        from fedlora import __version__

        print(f"fedlora {__version__}")
        raise typer.Exit


app.command()(cli_run.run)
app.command()(cli_run.resume)
app.command()(cli_run.extend)
app.command()(cli_run.watch)
app.command()(cli_sweep.sweep)
app.command()(cli_sweep.report)
app.command()(cli_generate.generate)
app.command()(cli_bench.bench)


@app.command()
def aggregate(
    clients: Annotated[
        list[Path], typer.Argument(metavar="CLIENT_DIR...", help="PEFT adapter folders, trained anywhere.")
    ],
    strategy: Annotated[str, typer.Option(help="How they are combined (`fedlora strategies`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the result.")],
    weights: Annotated[
        str | None, typer.Option(metavar="3,1,2", help="One per client, such as its examples. Without it: equal.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="4,8,8", help="Rank at which each goes on. Without it: its own.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the strategy; may be repeated.")
    ] = None,
    per_client: Annotated[bool, typer.Option(help="Also one folder per client, at its own rank.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Divergence, bytes and seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Of what a strategy draws.")] = 0,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Needed where clients trained rows of different tokens.")
    ] = None,
) -> None:
    """Aggregate PEFT adapter folders: no training, no base model.

    For example: fedlora aggregate --strategy flora-na --out global --weights 3,1 alice bob
    """
    from fedlora.config import configfile
    from fedlora.exchange import aggregation
    from fedlora.exchange.result import check_target
    from fedlora.strategies import registry

    check_target(out, registry.find(strategy).traits.personal, per_client, report)
    result = aggregation.aggregate(
        clients,
        strategy,
        _numbers("weights", weights, float),
        _numbers("ranks", ranks, int),
        configfile.parse_overrides(option or []),
        seed,
        base=base,
    )
    result.save(out, per_client, report)
    found = result.divergence
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{strategy}: {counted(len(result.clients), 'client')}, rho {found.rho:.4g} (floor {found.floor:.4g})")
    if result.adapter is not None and result.global_rho != found.rho:
        print(f"that is of what each receives at its own rank; of the global adapter: rho {result.global_rho:.4g}")
    print(f"written           {out}" + (f"\nreport            {report}" if report else ""))
    if result.base:
        print(
            "base update       base_delta.safetensors: part of the result. fedlora merge makes a plain model of both, "
            "fedlora.apply_base_update adds it"
        )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="An adapter folder, ours or anyone's.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the model.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder or hub id. Without it: what the adapter says.")
    ] = None,
) -> None:
    """Merge an adapter, and its base update if it has one, into a plain model folder."""
    from fedlora.exchange import merging

    merging.merge(adapter, out, base)
    print(f"written           {out}")


@app.command()
def strategies(
    name: Annotated[str | None, typer.Argument(help="Tell all about one strategy, its options too.")] = None,
) -> None:
    """The aggregation strategies, a line each; with a name, all about one."""
    from fedlora.strategies import registry
    from fedlora_cli import tables

    if name:
        tables.strategy(registry.find(name), sys.stdout)
        return
    rows, broken = [], []
    for each in registry.names():
        try:
            s = registry.find(each)
        except ConfigError as error:
            broken.append(f"not usable: {error}")
            continue
        ranks = "one" if s.traits.one_rank else "any"
        rows.append((s.name, s.traits.family.value, "yes" if s.traits.exact else "", ranks, s.summary))
    tables.listing(("name", "family", "exact", "ranks", "what it does"), rows, sys.stdout)
    print("family: SP sum-product, PS product-sum; exact: ρ = 0; ranks: whether clients may have different ones.")
    print("More about one, and its options: fedlora strategies NAME")
    broken += [f"not used: a plug-in's '{name}', which is a name of ours" for name in registry.shadowed()]
    print("\n".join(broken), end="\n" if broken else "")


app.add_typer(cli_datasets.app, name="datasets")


@app.command()
def models() -> None:
    """The models that have a name, a line each."""
    from fedlora.model.known import KNOWN
    from fedlora_cli import tables

    rows = [
        (known.name, "yes" if known.shipped() else "no", known.pooling, known.hub_id or "–", known.summary)
        for known in KNOWN.values()
    ]
    tables.listing(("name", "here", "pooling", "Hugging Face id", "what it is"), rows, sys.stdout)
    print("Also: any Hugging Face id or local folder with a text model (model.name=…).")


@app.command()
def up(
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000,
    database: Annotated[str | None, typer.Option(hidden=True)] = None,
    cpu_runs: Annotated[int | None, typer.Option(help="Flow runs at a time in cpu-workers; 2 at first.")] = None,
    gpu_runs: Annotated[
        int | None, typer.Option(help="The same for gpu-workers, 0 for no worker; one per GPU at first.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="IPv4 address to listen on; 127.0.0.1 at first. On any other, both servers ask for a password, which "
            "the environment must hold (docs/security.md).",
        ),
    ] = None,
    authenticate: Annotated[
        bool, typer.Option("--authenticate", help="Ask for a password on 127.0.0.1 too, as behind a proxy with TLS.")
    ] = False,
) -> None:
    """Start a local Prefect server, MLflow server and workers, on loopback, and register the deployments."""
    if database is not None:
        raise ConfigError(
            "--database is gone: set PREFECT_SERVER_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI, or, where "
            "several people use a machine, take deployments/compose.yaml (docs/deployments.md, 'PostgreSQL')"
        )
    environment.prepare()
    from deployments.local import services

    services.up(prefect_port, mlflow_port, host, cpu_runs=cpu_runs, gpu_runs=gpu_runs, authenticate=authenticate)


@app.command()
def down() -> None:
    """Stop exactly what `fedlora up` started; what was recorded stays."""
    environment.prepare()
    from deployments.local import services

    services.down()


app.command()(cli_status.status)


Number = TypeVar("Number", int, float)


def _numbers(name: str, text: str | None, kind: type[Number]) -> list[Number] | None:
    """`3,1,2` as numbers."""
    if text is None:
        return None
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name} {text} cannot be read; expected numbers with commas, like 3,1,2") from None


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors the user can mend are one line on stderr, with a non-zero exit."""
    signal.signal(signal.SIGTERM, _interrupt)
    output.settle()
    try:
        os.environ.update(addresses.direct(os.environ))  # models and data of a hub, too
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except FedloraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if error.format_message():  # empty where the help was all there was to say
            print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
