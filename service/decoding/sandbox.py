"""What a decoder worker may still do once it is up: read the videos' folders and the libraries
that it runs on, and talk to its parent over the pipe that it has. For a file that takes its decoder
over.

Two layers of the Linux kernel, neither of which needs privileges: Landlock (5.13 and later) for
files and TCP, and a seccomp filter for system calls that decoding never needs (sockets, programs,
processes, other processes' memory, the kernel's less trodden paths). What cannot be had is told.
Run on x86-64; on aarch64 the numbers are from the kernel's tables and were not run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

LAYERS = ("landlock", "seccomp")

_PR_SET_NO_NEW_PRIVS = 38
# Landlock: linux/landlock.h. Its system calls have one number on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# How many rights over files each version of the interface knows; TCP came with the fourth, signals
# and abstract sockets with the sixth.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP_RIGHTS, _SCOPES = 0b11, 0b11

# seccomp: linux/seccomp.h, linux/filter.h, linux/audit.h.
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000

_SECCOMP = {"x86_64": 317, "aarch64": 277}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
# Name: numbers on x86_64 and aarch64; None where the architecture does not have it.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "ptrace": (101, 117),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
}


def enter(folders: Sequence[Path] | None) -> tuple[str, ...]:
    """Locks this process in, for good; threads that run already stay out of Landlock.

    Args:
        folders: what may be read beside Python and its libraries; None: any file. Nothing may be
            written, removed or executed in either case.

    Returns:
        the `LAYERS` that hold; the others this kernel or this architecture does not have.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return ()
    layers = {"landlock": _enter_landlock(libc, folders), "seccomp": _enter_seccomp(libc)}
    return tuple(name for name in LAYERS if layers[name])


def _enter_landlock(libc: ctypes.CDLL, folders: Sequence[Path] | None) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if version < 1:
        return False
    attributes = struct.pack(
        "=QQQ",
        (1 << _FILE_RIGHTS.get(version, 16)) - 1,
        _TCP_RIGHTS if version >= 4 else 0,
        _SCOPES if version >= 6 else 0,
    )
    # Older kernels take a shorter struct, and a longer one whose end is zero.
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        readable = [Path("/")] if folders is None else [*folders, *_libraries()]
        return (
            all(_allow_reading(libc, ruleset, path) for path in readable)
            and libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def _allow_reading(libc: ctypes.CDLL, ruleset: int, path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # what is not there need not be read
    try:
        rights = _READ_FILE | _READ_DIR if path.is_dir() else _READ_FILE
        rule = struct.pack("=Qi", rights, descriptor)
        added: int = libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
        return added == 0
    finally:
        os.close(descriptor)


def _libraries() -> Iterable[Path]:
    """Where Python, its packages and their shared libraries lie, for what is loaded late."""
    places = [sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"]
    return map(Path, dict.fromkeys(place for place in places if place))


def _enter_seccomp(libc: ctypes.CDLL) -> bool:
    machine = platform.machine()
    if machine not in _SECCOMP:
        return False
    program = _filter(machine)
    instructions = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    entered: int = libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _ALL_THREADS, filter_)
    return entered == 0


def _filter(machine: str) -> bytes:
    """The BPF program: instructions of (code, jump if true, jump if false, operand)."""
    column = 0 if machine == "x86_64" else 1
    denied = [numbers[column] for numbers in _DENIED.values() if numbers[column] is not None]
    deny = _ERRNO | errno.EPERM
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),  # system calls of another architecture
        (_LOAD, 0, 0, _NR),
        (_JUMP_GREATER_EQUAL, 0, 1, _X32),
        (_RETURN, 0, 0, deny),
        # Threads are let be, processes are not. What clone3 is to make lies in memory where a
        # filter cannot look; the C library falls back to clone.
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_JUMP_EQUAL, 0, 4, _CLONE[machine]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_SET, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, deny),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for number in denied:
        lines += [(_JUMP_EQUAL, 0, 1, number or 0), (_RETURN, 0, 0, deny)]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
