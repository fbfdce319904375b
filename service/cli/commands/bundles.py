"""`timesformer bundles`: the versions of a store, and which of them serves."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import (
    EXIT_PARTLY_FAILED,
    Command,
    json_option,
    print_rows,
    store_option,
)

if TYPE_CHECKING:
    from export.bundle.bundle import Bundle, BundleStore

_SHARE = click.FloatRange(min=0, min_open=True, max=1)


@click.group(invoke_without_command=True)
@store_option
@json_option
@click.pass_context
def bundles(context: click.Context, store: Path | None, as_json: bool) -> None:
    """List the bundles of a store; activate, roll back, try or verify one."""
    from export.bundle.bundle import BundleStore
    from model.demo import STORE

    context.obj = BundleStore(store or STORE), as_json
    if context.invoked_subcommand is None and _list_bundles(*context.obj):
        sys.exit(EXIT_PARTLY_FAILED)


def _bundles_options(command: Command) -> Command:
    """`--store` and `--json` also after the subcommand, where people write them."""

    @functools.wraps(command)
    def with_store(*, store: Path | None, as_json: bool, **arguments: Any) -> None:
        from export.bundle.bundle import BundleStore

        outer_store, outer_json = click.get_current_context().obj
        command(BundleStore(store) if store else outer_store, as_json or outer_json, **arguments)

    option = click.option("--store", type=click.Path(path_type=Path), help="Folder of bundles.")
    return option(json_option(with_store))


def _list_bundles(store: BundleStore, as_json: bool) -> int:
    """Prints what there is; returns how many versions cannot be read, each named on stderr."""
    from export.bundle.bundle import BundleError

    rows, unreadable = [], 0
    for name in store.names():
        for version in store.versions(name):
            try:
                rows.append(_bundle_row(store, name, version))
            except BundleError as error:
                unreadable += 1
                click.secho(f"{name} {version}: {error}", fg="red", err=True)
    columns = ["name", "version", "active", "created", "attention type", "classes", "verified"]
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        cells = [[_cell(row[column.replace(" ", "_")]) for column in columns] for row in rows]
        print_rows(str(store.root), columns, cells)
    elif not unreadable:
        click.echo(f"no bundles in {store.root}; `timesformer export` makes one")
    return unreadable


def _bundle_row(store: BundleStore, name: str, version: str) -> dict[str, Any]:
    bundle = store.open(name, version)
    return {
        "name": name,
        "version": version,
        "active": store.active(name) == version,
        "created": bundle.manifest.created.isoformat(timespec="seconds"),
        "attention_type": bundle.config.attention_type,
        "classes": bundle.config.num_classes,
        "verified": all(result.passed for result in bundle.manifest.verification.values()),
        "path": str(bundle.path),
    }


@bundles.command()
@click.argument("name")
@click.argument("version")
@click.option("--url", help="In the store at this URL; services that follow it take it over.")
@_bundles_options
def activate(store: BundleStore, as_json: bool, name: str, version: str, url: str | None) -> None:
    """Make VERSION of NAME the one that serves, after checking it."""
    if url is None:
        store.activate(name, version)
    else:
        from export.bundle.remote_store import RemoteStore

        RemoteStore(url).activate(name, version)
    _say_active(name, version, as_json)


@bundles.command()
@click.argument("url")
@click.argument("name")
@click.argument("version", required=False)
@click.option("--activate", is_flag=True, help="Make it the version that serves there.")
@_bundles_options
def push(
    store: BundleStore, as_json: bool, url: str, name: str, version: str | None, activate: bool
) -> None:
    """Upload VERSION of NAME, by default the active one, to the store at URL (s3://, gs://)."""
    from export.bundle.remote_store import RemoteStore

    bundle, remote = store.open(name, version), RemoteStore(url)
    new = remote.push(bundle)
    if activate:
        remote.activate(name, bundle.version)
    _say_moved(bundle, remote.url, new, as_json)


@bundles.command()
@click.argument("url")
@click.argument("name")
@click.argument("version", required=False)
@_bundles_options
def pull(store: BundleStore, as_json: bool, url: str, name: str, version: str | None) -> None:
    """Fetch VERSION of NAME, by default the active one, from the store at URL; checked, and not
    activated here."""
    from export.bundle.bundle import BundleError
    from export.bundle.remote_store import RemoteStore

    remote = RemoteStore(url)
    wanted = version or next(iter(remote.history(name)), None)
    if wanted is None:
        raise BundleError(f"{name} has no active version in {remote.url}; say which VERSION")
    new = wanted not in store.versions(name)
    _say_moved(remote.pull(name, wanted, store), str(store.root), new, as_json)


def _say_moved(bundle: Bundle, to: str, new: bool, as_json: bool) -> None:
    if as_json:
        row = {"name": bundle.name, "version": bundle.version, "to": to, "new": new}
        click.echo(json.dumps(row))
    else:
        state = "is now" if new else "was already"
        click.echo(f"{bundle.name} version {bundle.version} {state} in {to}")


@bundles.command()
@click.argument("name")
@_bundles_options
def rollback(store: BundleStore, as_json: bool, name: str) -> None:
    """Go back to the version of NAME that was active before."""
    _say_active(name, store.rollback(name).version, as_json)


def _say_active(name: str, version: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"name": name, "version": version, "active": True}))
    else:
        click.echo(f"{name} version {version} is active")


@bundles.command()
@click.argument("name")
@click.argument("version", required=False)
@click.option("--shadow", type=_SHARE, help="Give it copies of this share of the requests, 0 to 1.")
@click.option("--canary", type=_SHARE, help="Let it answer this share of the requests, 0 to 1.")
@click.option("--off", is_flag=True, help="Try none any more.")
@_bundles_options
def candidate(
    store: BundleStore,
    as_json: bool,
    name: str,
    version: str | None,
    shadow: float | None,
    canary: float | None,
    off: bool,
) -> None:
    """Let running services try VERSION of NAME beside the active one; `activate` promotes it.

    As a shadow it is compared and answers nobody. Without VERSION, says what is tried.
    """
    from export.bundle.bundle import BundleError, Candidate

    modes = {"shadow": shadow, "canary": canary}
    given = [(mode, share) for mode, share in modes.items() if share is not None]
    if len(given) != (version is not None) or (off and given):
        raise click.UsageError(
            "give VERSION with one of --shadow and --canary, or --off, or neither to be told"
        )
    if not store.versions(name):
        raise BundleError(f"{store.root} has no bundle named {name}")
    if off:
        store.try_candidate(name, None)
    if version is not None:
        store.open(name, version)  # says which versions there are, if not this one
        ((mode, share),) = given
        wanted = {"version": version, "mode": mode, "share": share}
        store.try_candidate(name, Candidate.model_validate(wanted))
    _say_candidate(store, name, as_json)


def _say_candidate(store: BundleStore, name: str, as_json: bool) -> None:
    tried = store.candidate(name)
    if as_json:
        found = tried.model_dump(mode="json") if tried else None
        click.echo(json.dumps({"name": name, "candidate": found}))
    elif tried is None:
        click.echo(f"no version of {name} is tried")
    else:
        kind = "requests are answered by it" if tried.mode == "canary" else "requests are copied"
        click.echo(f"{name} version {tried.version}: {tried.share:.2%} of the {kind}")


@bundles.command()
@click.argument("name", required=False)
@click.argument("version", required=False)
@_bundles_options
def verify(store: BundleStore, as_json: bool, name: str | None, version: str | None) -> None:
    """Check files against their hashes: one VERSION, all of NAME, or the whole store.

    Nothing is run: `timesformer verify` does that. With --json, one object a bundle. Exit code 3 if
    any is not as it was published.
    """
    from export.bundle.bundle import BundleError

    failed = False
    names = [name] if name else store.names()
    if not names:
        raise BundleError(f"there are no bundles in {store.root}")
    for each in names:
        versions = [version] if version else store.versions(each)
        if not versions:
            raise BundleError(f"{store.root} has no bundle named {each}")
        for number in versions:
            problem = None
            try:
                store.open(each, number).verify()
            except BundleError as error:
                failed, problem = True, str(error)
            _say_verified(each, number, problem, as_json)
    if failed:
        sys.exit(EXIT_PARTLY_FAILED)


def _say_verified(name: str, version: str, problem: str | None, as_json: bool) -> None:
    if as_json:
        row = {"name": name, "version": version, "ok": problem is None, "problem": problem}
        click.echo(json.dumps(row))
    else:
        click.secho(f"{name} {version}: {problem or 'ok'}", fg="red" if problem else None)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
