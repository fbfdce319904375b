"""What the API's description says, asked of a running service by Schemathesis, with an API key that
may do everything.

    python -m tests.faults.openapi [--examples 50] [--st build/faults/bin/st]

Of Schemathesis' checks one is left out: that what fits the description is accepted. Its random
bytes are no videos, and its names are no models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from model.demo import STORE
from service.api.auth import ApiKey, new_key, write_keys
from tests.e2e.conftest import run_service


def main() -> None:
    """Exits as Schemathesis does: with 1 if a check failed."""
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key, digest = new_key()
        write_keys(
            folder / "keys.json", (ApiKey(name="all", sha256=digest, scopes=("infer", "admin")),)
        )
        shutil.copytree(STORE, folder / "store")
        add_version(folder / "store" / "demo")
        (folder / "jobs").mkdir()
        flags = {
            "--store": folder / "store",
            "--api-keys-file": folder / "keys.json",
            "--spool-dir": folder,
            "--jobs-dir": folder / "jobs",
            "--log-level": "error",
            **options.flags,
        }
        with run_service(*(str(part) for flag in flags.items() for part in flag)) as service:
            command = [
                *(options.st, "run", f"{service.client.base_url}/openapi.json"),
                *("--header", f"Authorization: Bearer {key}", "--checks", "all"),
                *("--exclude-checks", "positive_data_acceptance"),
                *("--max-examples", str(options.examples), "--request-timeout", "60"),
                *("--continue-on-failure", "--no-color"),
            ]
            status = subprocess.run(command, cwd=folder).returncode
            alive = service.client.get("/health/ready").status_code == 200
    if status or not alive:
        sys.exit(status or "the service is not ready any more")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--st", type=Path, default=Path("build/faults/bin/st"))
    parser.add_argument(
        "--flags", type=json.loads, default={}, help='more of the service, {"--flag": "value"}'
    )
    options = parser.parse_args()
    options.st = options.st.absolute()
    return options


def add_version(model: Path) -> None:
    """A second version, the same but for its number, so that there is one to switch to."""
    shutil.copytree(model / "1", model / "2")
    path = model / "2" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": "2"}))


if __name__ == "__main__":
    main()
