"""`timesformer keys`: the file of API keys. A running service follows its changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_file_option = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="TIMESFORMER_API_KEYS_FILE",
    required=True,
    help="File of API keys. [env: TIMESFORMER_API_KEYS_FILE]",
)


@click.group()
def keys() -> None:
    """Create, list and revoke API keys."""


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["infer", "admin"]),
    multiple=True,
    default=("infer",),
    show_default=True,
    help="What the key may do; repeatable. `admin` includes `infer`.",
)
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="By default no limit.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="By default no limit.")
@click.option(
    "--priority",
    type=click.Choice(["high", "normal", "low"]),
    default="normal",
    show_default=True,
    help="Of its requests when many wait; they may ask for less, not for more.",
)
@_file_option
def create(path: Path, name: str, **fields: Any) -> None:
    """Make a key for NAME and print it; it is kept as a hash, so this is the only time."""
    from pydantic import ValidationError

    from service.api.auth import ApiKey, new_key, read_keys, write_keys

    known = read_keys(path) if path.exists() else ()
    if name in {key.name for key in known}:
        raise click.ClickException(f"{path} has a key named {name}; revoke it first")
    key, digest = new_key()
    try:
        entry = ApiKey(name=name, sha256=digest, **fields)
    except ValidationError:
        raise click.UsageError("NAME may have letters, digits, '.', '_' and '-'") from None
    write_keys(path, (*known, entry))
    click.echo(key)


@keys.command(name="list")
@_file_option
def list_keys(path: Path) -> None:
    """Show names, scopes and limits; the keys themselves are nowhere."""
    from rich.table import Table

    from service.api.auth import read_keys
    from service.observability.progress import print_table

    table = Table("name", "scopes", "priority", "requests a minute", "at once")
    for key in read_keys(path):
        limits = (key.requests_per_minute, key.max_concurrent)
        own = key.name, ", ".join(key.scopes), key.priority
        table.add_row(*own, *(str(limit or "") for limit in limits))
    print_table(str(path), table)


@keys.command()
@click.argument("name")
@_file_option
def revoke(path: Path, name: str) -> None:
    """Take the key of NAME back."""
    from service.api.auth import read_keys, write_keys

    known = read_keys(path)
    left = tuple(key for key in known if key.name != name)
    if left == known:
        raise click.ClickException(f"{path} has no key named {name}")
    write_keys(path, left)
    click.echo(f"revoked {name}")
