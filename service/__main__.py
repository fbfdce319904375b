"""The entry point of the command `timesformer`, and of `python -m service`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command."""
    # `multiprocessing` imports the module that started a program into each decoder, but not a
    # `__main__` of a package. The script of the command passes for one.
    sys.modules["__main__"].__spec__ = __spec__
    from service.cli.main import cli

    cli()


if __name__ == "__main__":
    main()
