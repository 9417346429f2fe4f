"""The uops of instructions on a Pentium II, with ports and latencies, as a table for model.c.

Instructions are disassembled by `capstone`. Latencies and ports follow the public optimisation guides for the
P6, from memory and simplified; bench/pentium2.py compares the model with measurements of a real machine.

A line of the table: "address size uops branch stack", then for each uop "port latency occupancy memory
sources... targets...", the last two with their numbers first. `port` is a set of bits: 1 = port 0, 2 = port
1, 3 = either, 4 = loads, 8 = store addresses, 16 = store data, 0 = none. `stack` is how much the x87 stack
grows.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import capstone
from capstone import x86

ALU0, ALU1, ALU, LOAD_PORT, ADDRESS_PORT, DATA_PORT = 1, 2, 3, 4, 8, 16
NO_MEMORY, LOADS, STORE_ADDRESS, STORE_DATA = 0, 1, 2, 3
NO_BRANCH, CONDITIONAL, JUMP = 0, 1, 2
LOAD_CLOCKS = 3
PT_LOAD = 1  # of ELF
LONGEST_INSTRUCTION = 15  # bytes

# Registers of the model: 0-7 general, 8 flags, 9 and 10 between uops, 16-23 MMX, 24-31 x87 from the top.
FLAGS, LOADED, RESULT, MMX, X87 = 8, 9, 10, 16, 24
ESP, ESI, EDI = 4, 6, 7
_FAMILIES = (
    "eax ax al ah",
    "ecx cx cl ch",
    "edx dx dl dh",
    "ebx bx bl bh",
    "esp sp",
    "ebp bp",
    "esi si",
    "edi di",
)
REGISTERS = (
    {name: number for number, family in enumerate(_FAMILIES) for name in family.split()}
    | {f"mm{i}": MMX + i for i in range(8)}
    | {f"st({i})": X87 + i for i in range(8)}
    | {"st": X87, "eflags": FLAGS}
)

X87_ARITHMETIC = {
    "fadd": (3, 1),
    "fsub": (3, 1),
    "fsubr": (3, 1),
    "fmul": (5, 2),
    "fdiv": (38, 37),
    "fdivr": (38, 37),
}
X87_CONSTANTS = {"fldz", "fld1", "fldln2", "fldl2e", "fldpi", "fldlg2", "fldl2t"}
X87_SLOW = {"f2xm1", "fyl2x", "fyl2xp1", "fscale", "frndint", "fprem"}
X87_TRIGONOMETRY = {"fsin", "fcos", "fpatan", "fptan", "fsincos"}
ONLY_PORT_0 = {
    "shl",
    "shr",
    "sar",
    "rol",
    "ror",
    "sal",
    "shld",
    "shrd",
    "bt",
    "bts",
    "btr",
    "bsr",
    "bsf",
    "cdq",
}
STRING_PREFIXES = ("movs", "stos", "lods", "scas", "cmps")
SOME_UOPS = ("xchg", "cpuid", "cld", "leave", "xadd", "cmpxchg", "rdtsc", "bswap")
# Mnemonic -> (port, latency, occupancy, further uops), where it is not one uop of one clock on either port.
INTEGER = (
    dict.fromkeys(ONLY_PORT_0, (ALU0, 1, 1, 0))
    | {"imul": (ALU0, 4, 1, 0), "mul": (ALU0, 4, 1, 2)}
    | dict.fromkeys(("div", "idiv"), (ALU0, 39, 37, 3))
    | dict.fromkeys(("adc", "sbb"), (ALU, 2, 1, 1))
    | dict.fromkeys(SOME_UOPS, (ALU, 1, 1, 2))
    | dict.fromkeys(("shld", "shrd"), (ALU0, 1, 1, 2))
)


@dataclass(frozen=True)
class Uop:
    """One of the operations that an instruction is split into."""

    port: int
    latency: int = 1
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    occupancy: int = 1
    memory: int = NO_MEMORY

    def __str__(self) -> str:
        sources, targets = self.sources[:4], self.targets[:2]
        numbers = (self.port, self.latency, self.occupancy, self.memory)
        return " ".join(map(str, (*numbers, len(sources), *sources, len(targets), *targets)))


Uops = tuple[list[Uop], int, int]  # uops, kind of branch, growth of the x87 stack
PLAIN = Uop(ALU)


class Instruction:
    """A disassembled instruction, with the registers that it reads and writes as the model numbers them."""

    def __init__(self, found: capstone.CsInsn) -> None:
        self._found = found
        self.address, self.size = found.address, found.size
        self.name = found.mnemonic.split()[-1]
        reads, writes = found.regs_access()
        self.reads, self.writes = self._numbers(reads), self._numbers(writes)
        self.operands = found.operands
        memory = [operand.mem for operand in found.operands if operand.type == x86.X86_OP_MEM]
        self.in_memory = bool(memory)
        self.memory_first = bool(memory) and found.operands[0].type == x86.X86_OP_MEM
        self.address_registers = self._numbers((memory[0].base, memory[0].index)) if memory else []
        self.registers = self._numbers(
            operand.reg for operand in found.operands if operand.type == x86.X86_OP_REG
        )

    def _numbers(self, registers: Iterable[int]) -> list[int]:
        names = (self._found.reg_name(register) for register in registers if register)
        return [REGISTERS[name] for name in names if name in REGISTERS]

    @property
    def values(self) -> list[int]:
        """The registers read for more than the address."""
        return [r for r in self.reads if r not in self.address_registers or r in self.registers]

    @property
    def stack_registers(self) -> list[int]:
        """The x87 operands, counted from the top of the stack."""
        return [r - X87 for r in self.registers if r >= X87]

    def load(self, target: int = LOADED) -> Uop:
        """The load of its memory operand."""
        return Uop(LOAD_PORT, LOAD_CLOCKS, self.address_registers, [target], memory=LOADS)

    def store(self, sources: list[int]) -> list[Uop]:
        """The store to its memory operand."""
        return [
            Uop(ADDRESS_PORT, 1, self.address_registers, memory=STORE_ADDRESS),
            Uop(DATA_PORT, 1, sources, memory=STORE_DATA),
        ]


def uops(i: Instruction) -> Uops:
    """The uops of an instruction."""
    padding = i.name == "xchg" and not i.in_memory and len(set(i.registers)) == 1
    if padding or i.name in ("nop", "endbr32"):
        return [PLAIN], NO_BRANCH, 0
    if i.name.startswith("f"):
        made, stack = x87(i)
        return made, NO_BRANCH, stack
    if i.name in ("ret", "call", "jmp") or i.name.startswith(("j", "loop")):
        return branch(i)
    if i.name.startswith("p") and any(MMX <= r < X87 for r in i.reads + i.writes):
        return mmx(i), NO_BRANCH, 0
    if i.name.startswith(STRING_PREFIXES) and len(i.name) == 5 and i.name[-1] in "bwd":
        return string(i), NO_BRANCH, 0
    if i.name in ("mov", "movzx", "movsx", "movq", "movd"):
        return move(i), NO_BRANCH, 0
    simple = {"push": push, "pop": pop}.get(i.name, integer)
    return simple(i), NO_BRANCH, 0


def x87(i: Instruction) -> tuple[list[Uop], int]:
    """Floating point: uops and growth of the stack."""
    name, top, st = i.name, X87, i.stack_registers
    pops = -1 if name.endswith("p") else 0
    base = name[:-1] if pops and name[:-1] in X87_ARITHMETIC else name
    if base in X87_ARITHMETIC:
        return x87_arithmetic(i, base), -1 if base != name else 0
    if name == "fld":
        return [i.load(X87 + 7) if i.in_memory else Uop(ALU, 1, [top + (st or [0])[0]], [X87 + 7])], 1
    if name in X87_CONSTANTS:
        return [Uop(ALU0, 1, [], [X87 + 7]), PLAIN], 1
    if name in ("fst", "fstp"):
        return i.store([top]) if i.in_memory else [Uop(ALU, 1, [top], [top + (st or [0])[-1]])], pops
    if name in ("fiadd", "fimul", "fisub"):
        steps = [Uop(ALU0, 3, [LOADED], [LOADED]), Uop(ALU, 1, [LOADED], [LOADED])]
        return [i.load(), *steps, Uop(ALU0, 5, [LOADED, top], [top])], 0
    if name == "fild":
        steps = [Uop(ALU, 1, [LOADED], [LOADED]), Uop(ALU0, 1, [LOADED], [LOADED])]
        return [i.load(), *steps, Uop(ALU, 1, [LOADED], [X87 + 7])], 1
    if name in ("fist", "fistp"):
        steps = [Uop(ALU, 1, [LOADED], [LOADED])] * 2
        rounded = [Uop(ALU0, 3, [top], [LOADED]), *steps, Uop(ALU0, 1, [LOADED], [LOADED])]
        return [*rounded, *i.store([LOADED])], pops
    if name == "fxch":
        both = [top, top + (st or [1])[-1]]
        return [Uop(0, 0, both, both)], 0
    if name in ("fchs", "fabs"):
        return [Uop(ALU0, 1, [top], [top])], 0
    return x87_rare(i)


def x87_arithmetic(i: Instruction, base: str) -> list[Uop]:
    """Sums, products, quotients, with a value from memory or the stack."""
    latency, occupancy = X87_ARITHMETIC[base]
    top, st = X87, i.stack_registers
    if i.in_memory:
        return [i.load(), Uop(ALU0, latency, [LOADED, top], [top], occupancy)]
    if base != i.name:  # the popping form
        other = top + ((st[0] or (st[-1] if len(st) > 1 else 1)) if st else 1)
        return [Uop(ALU0, latency, [top, other], [other], occupancy)]
    target = top + (st[0] if len(st) > 1 else 0)
    source = top + (st[1] if len(st) > 1 else (st or [1])[0])
    return [Uop(ALU0, latency, [target, source], [target], occupancy)]


def x87_rare(i: Instruction) -> tuple[list[Uop], int]:
    """Comparisons, control words, roots and transcendental functions."""
    name, top, st = i.name, X87, i.stack_registers
    other = top + (st or [1])[-1]
    if name.startswith(("fcom", "fucom", "ftst")):
        compared = LOADED if i.in_memory else other
        pops = -2 if name.endswith("pp") else -1 if name.endswith(("p", "pi")) else 0
        return [*([i.load()] if i.in_memory else []), Uop(ALU0, 1, [top, compared], [FLAGS])], pops
    if name in ("fnstsw", "fstsw", "fnstcw", "fldcw"):
        made = [Uop(ALU0, 3, [FLAGS], [LOADED if i.in_memory else 0]), Uop(ALU, 3)]
        return made + (i.store([LOADED]) if i.in_memory else []), 0
    if name.startswith("fcmov"):
        return [Uop(ALU0, 2, [top, other, FLAGS], [top]), PLAIN], 0
    if name == "fsqrt":
        return [Uop(ALU0, 69, [top], [top], 69)], 0
    if name in X87_TRIGONOMETRY:
        return [Uop(ALU0, 80, [top], [top], 60), *[PLAIN] * 20], 0
    if name in X87_SLOW:
        return [Uop(ALU0, 50, [top], [top], 40), *[PLAIN] * 15], -1 if name.startswith("fyl2") else 0
    return [Uop(ALU0, 3, [top], [top])], 0


def branch(i: Instruction) -> Uops:
    """Jumps, calls and returns."""
    loads = [i.load()] if i.in_memory else []
    if i.name == "ret":
        pop_address = Uop(LOAD_PORT, LOAD_CLOCKS, [ESP], [LOADED], memory=LOADS)
        return [pop_address, Uop(ALU, 1, [ESP], [ESP]), Uop(ALU1, 1, [LOADED])], JUMP, 0
    jump = Uop(ALU1, 1, [LOADED] if loads else [])
    if i.name == "call":
        return [*loads, *push_value([]), jump], JUMP, 0
    if i.name == "jmp":
        return [*loads, Uop(ALU1, 1, [LOADED] if loads else i.reads)], JUMP, 0
    return [Uop(ALU1, 1, [FLAGS])], CONDITIONAL, 0


def push_value(sources: list[int]) -> list[Uop]:
    """A word onto the stack."""
    return [
        Uop(ADDRESS_PORT, 1, [ESP], memory=STORE_ADDRESS),
        Uop(DATA_PORT, 1, sources, memory=STORE_DATA),
        Uop(ALU, 1, [ESP], [ESP]),
    ]


def push(i: Instruction) -> list[Uop]:
    """A register, number or word of memory onto the stack."""
    if i.in_memory:
        return [i.load(), *push_value([LOADED])]
    return push_value([r for r in i.reads if r != ESP])


def pop(i: Instruction) -> list[Uop]:
    """A word from the stack."""
    targets = [r for r in i.writes if r != ESP][:1]
    return [Uop(LOAD_PORT, LOAD_CLOCKS, [ESP], targets, memory=LOADS), Uop(ALU, 1, [ESP], [ESP])]


def string(i: Instruction) -> list[Uop]:
    """One step of a string instruction."""
    made: list[Uop] = []
    if not i.name.startswith("stos"):
        made.append(Uop(LOAD_PORT, LOAD_CLOCKS, [ESI], [LOADED], memory=LOADS))
    if i.name.startswith(("movs", "stos")):
        made.append(Uop(ADDRESS_PORT, 1, [EDI], memory=STORE_ADDRESS))
        made.append(Uop(DATA_PORT, 1, [LOADED], memory=STORE_DATA))
    return [*made, Uop(ALU, 1, [ESI, EDI], [ESI, EDI])]


def move(i: Instruction) -> list[Uop]:
    """A load, a store, or a copy between registers."""
    if i.memory_first:
        return i.store([r for r in i.reads if r not in i.address_registers] or i.values)
    if i.in_memory:
        return [i.load((i.writes or [LOADED])[0])]
    return [Uop(ALU, 1, i.reads, i.writes[:1])]


def mmx(i: Instruction) -> list[Uop]:
    """Packed integers: products on port 0, shifts and packing on port 1."""
    port, latency = ALU, 1
    if i.name.startswith("pm"):
        port, latency = ALU0, 3
    elif i.name.startswith(("psra", "psrl", "psll", "punpck", "pack")):
        port = ALU1
    sources = [r for r in i.reads if MMX <= r < X87] + ([LOADED] if i.in_memory else [])
    targets = [r for r in i.writes if MMX <= r < X87][:1]
    return [*([i.load()] if i.in_memory else []), Uop(port, latency, sources, targets)]


def integer(i: Instruction) -> list[Uop]:
    """Everything else."""
    if i.name == "lea":
        return [Uop(ALU0, 1, i.address_registers, i.writes[:1])]
    if i.name == "emms":
        return [PLAIN] * 11
    port, latency, occupancy, further = INTEGER.get(i.name, (ALU, 1, 1, 0))
    if i.name.startswith("cmov"):
        latency, further = 2, 1
    flags = [FLAGS] if FLAGS in i.writes else []
    targets = [r for r in i.writes if r != FLAGS][:1] + flags
    if not i.in_memory:
        return [Uop(port, latency, i.reads, targets, occupancy), *[PLAIN] * further]
    changes = i.memory_first and i.name not in ("cmp", "test")
    sources = [r for r in i.values if not (i.memory_first and r in i.address_registers)]
    work = Uop(port, latency, [*sources, LOADED], [RESULT, *flags] if changes else targets, occupancy)
    return [i.load(), work, *(i.store([RESULT]) if changes else []), *[PLAIN] * further]


def segments(program: Path) -> list[tuple[int, bytes]]:
    """(address, content) of what a 32-bit ELF file loads."""
    data = program.read_bytes()
    table, size, count = struct.unpack_from("<I10xHH", data, 28)
    headers = [struct.unpack_from("<5I", data, table + size * index) for index in range(count)]
    return [(where, data[offset : offset + n]) for kind, offset, where, _, n in headers if kind == PT_LOAD]


def write_table(program: Path, addresses: Iterable[int], table: Path) -> None:
    """Write the table of the instructions at these addresses of a static program, for model.c."""
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    disassembler.detail = True
    loaded = segments(program)
    wanted = sorted(set(addresses))
    lines = [f"{wanted[0]} {wanted[-1]}"]
    for address in wanted:
        at, content = next((at, data) for at, data in loaded if at <= address < at + len(data))
        [found] = disassembler.disasm(content[address - at :][:LONGEST_INSTRUCTION], address, 1)
        made, kind, stack = uops(Instruction(found))
        lines.append(" ".join(map(str, (address, found.size, len(made), kind, stack, *made))))
    table.write_text("\n".join(lines) + "\n")
