"""The calls of Windows that Python lacks, by ctypes. Imported on Windows only.

Their documentation: https://learn.microsoft.com/windows/win32/api/, by the name of each function.
"""

import ctypes
import errno
import hashlib
import msvcrt
import os
import sys
from ctypes import wintypes
from pathlib import Path
from typing import Any

assert sys.platform == "win32", "never imported elsewhere"

LOCK_OFFSET = (1 << 63) - 2  # behind the end of every file: a locked byte cannot be read by others
LOCKFILE_FAIL_IMMEDIATELY, LOCKFILE_EXCLUSIVE_LOCK = 1, 2
ERROR_HANDLE_EOF, ERROR_LOCK_VIOLATION, ERROR_IO_PENDING, ERROR_ALREADY_EXISTS = 38, 33, 997, 183
PROCESS_TERMINATE, PROCESS_SET_QUOTA = 0x1, 0x100
LIMIT_PROCESS_TIME, LIMIT_PROCESS_MEMORY, LIMIT_KILL_ON_JOB_CLOSE = 0x2, 0x100, 0x2000
EXTENDED_LIMIT_INFORMATION = 9  # of JOBOBJECTINFOCLASS
SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 0x1, 0x2
STD_INPUT_HANDLE = -10
ENABLE_ECHO_INPUT = 0x4
PF_READS_BYTES_MAX = 1 << 30  # of one call: its length has 32 bits

_kernel = ctypes.WinDLL("kernel32", use_last_error=True)


class _Overlapped(ctypes.Structure):
    _fields_ = (
        ("Internal", ctypes.c_void_p),
        ("InternalHigh", ctypes.c_void_p),
        ("Offset", wintypes.DWORD),
        ("OffsetHigh", wintypes.DWORD),
        ("hEvent", wintypes.HANDLE),
    )


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
        ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
        ("LimitFlags", wintypes.DWORD),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", wintypes.DWORD),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", wintypes.DWORD),
        ("SchedulingClass", wintypes.DWORD),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (
        ("Basic", _BasicLimits),
        ("IoInfo", ctypes.c_ulonglong * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


def _declare(name: str, result: object, *arguments: object) -> Any:
    function = getattr(_kernel, name)
    function.restype, function.argtypes = result, arguments
    return function


_P = ctypes.POINTER
_DWORD, _BOOL, _HANDLE = wintypes.DWORD, wintypes.BOOL, wintypes.HANDLE
_read_file = _declare("ReadFile", _BOOL, _HANDLE, ctypes.c_void_p, _DWORD, _P(_DWORD), _P(_Overlapped))
_write_file = _declare("WriteFile", _BOOL, _HANDLE, ctypes.c_void_p, _DWORD, _P(_DWORD), _P(_Overlapped))
_lock_file = _declare("LockFileEx", _BOOL, _HANDLE, _DWORD, _DWORD, _DWORD, _DWORD, _P(_Overlapped))
_create_mutex = _declare("CreateMutexW", _HANDLE, ctypes.c_void_p, _BOOL, wintypes.LPCWSTR)
_close_handle = _declare("CloseHandle", _BOOL, _HANDLE)
_create_job = _declare("CreateJobObjectW", _HANDLE, ctypes.c_void_p, wintypes.LPCWSTR)
_set_job = _declare("SetInformationJobObject", _BOOL, _HANDLE, ctypes.c_int, ctypes.c_void_p, _DWORD)
_assign = _declare("AssignProcessToJobObject", _BOOL, _HANDLE, _HANDLE)
_open_process = _declare("OpenProcess", _HANDLE, _DWORD, _BOOL, _DWORD)
_current_process = _declare("GetCurrentProcess", _HANDLE)
_set_error_mode = _declare("SetErrorMode", wintypes.UINT, wintypes.UINT)
_std_handle = _declare("GetStdHandle", _HANDLE, _DWORD)
_get_console_mode = _declare("GetConsoleMode", _BOOL, _HANDLE, _P(_DWORD))
_set_console_mode = _declare("SetConsoleMode", _BOOL, _HANDLE, _DWORD)


def _failed() -> OSError:
    return ctypes.WinError(ctypes.get_last_error())


def _at(offset: int) -> _Overlapped:
    return _Overlapped(Offset=offset & 0xFFFFFFFF, OffsetHigh=offset >> 32)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """As os.pread; but the file's own position moves."""
    data, done = ctypes.create_string_buffer(min(nbytes, PF_READS_BYTES_MAX)), wintypes.DWORD()
    handle = msvcrt.get_osfhandle(descriptor)
    if not _read_file(handle, data, len(data), ctypes.byref(done), ctypes.byref(_at(offset))):
        if ctypes.get_last_error() != ERROR_HANDLE_EOF:
            raise _failed()
        return b""
    return data.raw[: done.value]


def write_at(descriptor: int, data: "bytes | memoryview", offset: int) -> int:
    """As os.pwrite; but the file's own position moves."""
    piece, done = bytes(data[:PF_READS_BYTES_MAX]), wintypes.DWORD()
    handle = msvcrt.get_osfhandle(descriptor)
    if not _write_file(handle, piece, len(piece), ctypes.byref(done), ctypes.byref(_at(offset))):
        raise _failed()
    return done.value


def lock(descriptor: int, *, wait: bool) -> None:
    """An exclusive lock on an open file, until it is closed; BlockingIOError if another holds it."""
    flags = LOCKFILE_EXCLUSIVE_LOCK | (0 if wait else LOCKFILE_FAIL_IMMEDIATELY)
    if not _lock_file(msvcrt.get_osfhandle(descriptor), flags, 0, 1, 0, ctypes.byref(_at(LOCK_OFFSET))):
        if ctypes.get_last_error() in (ERROR_LOCK_VIOLATION, ERROR_IO_PENDING):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock")
        raise _failed()


class FolderLock:
    """A lock on a folder, whatever is in it: a mutex that is named after its path, and goes with its process.

    Raises:
        BlockingIOError: another holds it.
    """

    def __init__(self, folder: Path) -> None:
        place = os.path.normcase(folder.resolve())
        name = f"Global\\cordee-{hashlib.sha256(place.encode(errors='surrogatepass')).hexdigest()}"
        self._handle = _create_mutex(None, False, name)
        is_held = ctypes.get_last_error() == ERROR_ALREADY_EXISTS
        if not self._handle:  # it is another account's
            raise BlockingIOError(errno.EWOULDBLOCK, "another account holds the lock")
        if is_held:
            self.close()
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock")

    def close(self) -> None:
        """Let go of it."""
        _close_handle(self._handle)


class ChildrenJob:
    """Processes that Windows ends together with this one, by whatever this one ends."""

    def __init__(self) -> None:
        self._handle = _limited_job(_ExtendedLimits(Basic=_BasicLimits(LimitFlags=LIMIT_KILL_ON_JOB_CLOSE)))

    def add(self, pid: int) -> None:
        """A process of ours, which may have ended already."""
        process = _open_process(PROCESS_TERMINATE | PROCESS_SET_QUOTA, False, pid)
        if process:
            _assign(self._handle, process)
            _close_handle(process)


def limit_memory(nbytes: int) -> None:
    """Let this process commit no more than this; what asks for more gets none. Not undone by anything."""
    basic = _BasicLimits(LimitFlags=LIMIT_PROCESS_MEMORY)
    _assign(_limited_job(_ExtendedLimits(Basic=basic, ProcessMemoryLimit=nbytes)), _current_process())


def _limited_job(limits: _ExtendedLimits) -> int:
    handle = _create_job(None, None)
    if not handle or not _set_job(
        handle, EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), ctypes.sizeof(limits)
    ):
        raise _failed()
    return handle


def no_error_reports() -> None:
    """Have no report, and so no dump of memory, written when this process or a child of it crashes."""
    _set_error_mode(SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)


def set_echo(shown: bool) -> bool:
    """Whether the console shows what is typed; gives how it was before. OSError: there is no console."""
    handle, mode = _std_handle(STD_INPUT_HANDLE & 0xFFFFFFFF), wintypes.DWORD()
    if not _get_console_mode(handle, ctypes.byref(mode)):
        raise _failed()
    wanted = mode.value | ENABLE_ECHO_INPUT if shown else mode.value & ~ENABLE_ECHO_INPUT
    if not _set_console_mode(handle, wanted):
        raise _failed()
    return bool(mode.value & ENABLE_ECHO_INPUT)
