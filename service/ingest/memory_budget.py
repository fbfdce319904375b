"""Memory for bodies that are not spooled: their bytes, from arrival to answer, within a quota."""

from __future__ import annotations

from service.errors import MemoryFullError


class Memory:
    """What all requests of this process hold together.

    Args:
        max_bytes: most bytes at once.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    def expect(self, count: int) -> None:
        """Asks whether so many bytes would fit at present; claims nothing, as they may never come.

        Raises:
            MemoryFullError: they would not.
        """
        if self.used_bytes + count > self.max_bytes:
            raise MemoryFullError("Too many clips are being received or wait at present.")

    def share(self) -> Share:
        """What one request is going to hold."""
        return Share(self)


class Share:
    """The bytes of one request; they are free again after its block."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._bytes = 0

    def take(self, count: int) -> None:
        """Counts bytes that have come.

        Raises:
            MemoryFullError: with them it is too much.
        """
        self.memory.expect(count)
        self.memory.used_bytes += count
        self._bytes += count

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.used_bytes -= self._bytes
