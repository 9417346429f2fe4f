"""What bench/pentium2_model/uops.py calls of capstone 5; after capstone/__init__.py of the package."""

from collections.abc import Iterator

from capstone.x86 import X86Op

CS_ARCH_X86: int
CS_MODE_32: int

class CsInsn:
    address: int
    size: int
    mnemonic: str
    operands: list[X86Op]
    def regs_access(self) -> tuple[list[int], list[int]]: ...
    def reg_name(self, reg_id: int) -> str: ...

class Cs:
    detail: bool
    def __init__(self, arch: int, mode: int) -> None: ...
    def disasm(self, code: bytes, offset: int, count: int = 0) -> Iterator[CsInsn]: ...
