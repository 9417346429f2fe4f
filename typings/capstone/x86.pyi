"""What bench/pentium2_model/uops.py reads of capstone 5; after capstone/x86.py and x86_const.py."""

X86_OP_REG: int
X86_OP_MEM: int

class X86OpMem:
    base: int
    index: int

class X86Op:
    type: int
    reg: int
    mem: X86OpMem
