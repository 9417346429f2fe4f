/* Plugin for qemu-user: how many instructions a program spends from one call of a function to the next, and the
 * trace of some of those calls.
 *
 *     qemu-i386 -plugin libcalls.so,start=HEX,first=F,last=L,counts=FILE,code=FILE PROGRAM ...
 *     qemu-i386 -plugin libcalls.so,start=HEX,first=F,last=L,trace=FILE PROGRAM ...
 *
 * Calls are numbered from 1; the program ends when call L begins, so F to L - 1 are measured. `counts` gets a line
 * for each call from 1 to L - 1, `code` the addresses of all instructions that were run, some of them several times.
 * `trace` gets pairs of 32-bit words, (address, kind); until call F the program runs without instrumentation.
 *
 * The interface below is that of qemu-plugin.h, API version 1, of QEMU 7.2; Debian ships no header for it.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { NO_REGISTERS = 0, READS_AND_WRITES = 3, INLINE_ADD_U64 = 0 };

typedef uint64_t plugin_id;
typedef void (*simple_callback)(plugin_id);
struct block;
struct instruction;

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct block *));
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
void qemu_plugin_reset(plugin_id, simple_callback);
size_t qemu_plugin_tb_n_insns(const struct block *);
struct instruction *qemu_plugin_tb_get_insn(const struct block *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct instruction *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct instruction *, int operation, void *, uint64_t);
void qemu_plugin_register_vcpu_insn_exec_cb(struct instruction *, void (*)(unsigned, void *), int flags, void *);
void qemu_plugin_register_vcpu_mem_cb(struct instruction *, void (*)(unsigned, uint32_t, uint64_t, void *), int flags,
                                      int direction, void *);
int qemu_plugin_mem_is_store(uint32_t);

EXPORT int qemu_plugin_version = 1;

enum { RUN = 0, LOAD = 1, STORE = 2, CALL = 3 }; /* kinds of records */
enum { BUFFER_WORDS = 1 << 17 };

static uint32_t start, first = 1, last = 2, calls;
static uint64_t instructions, before;
static FILE *counts, *code, *trace;
static uint32_t buffer[BUFFER_WORDS];
static unsigned filled;
static int tracing;

static void flush(void)
{
    if (fwrite(buffer, sizeof *buffer, filled, trace) != filled)
        exit(1); /* nobody reads any more */
    filled = 0;
}

static void record(uint32_t address, uint32_t kind)
{
    buffer[filled++] = address;
    buffer[filled++] = kind;
    if (filled == BUFFER_WORDS)
        flush();
}

static void end(void)
{
    if (trace) {
        flush();
        fclose(trace);
    }
    if (code)
        fclose(code);
    if (counts)
        fclose(counts);
    exit(0);
}

static void instrument(plugin_id, struct block *);

static void begin_trace(plugin_id id)
{
    qemu_plugin_register_vcpu_tb_trans_cb(id, instrument);
    tracing = 1;
}

static plugin_id own_id;

/* The function begins. A trace starts with the next block of instructions: some are lost once. */
static void entered(unsigned cpu, void *unused)
{
    (void)cpu, (void)unused;
    calls++;
    if (counts && calls > 1)
        fprintf(counts, "%llu\n", (unsigned long long)(instructions - before));
    before = instructions;
    if (calls == last)
        end();
    if (trace && calls == first)
        qemu_plugin_reset(own_id, begin_trace);
    if (trace && calls >= first)
        record(0, CALL);
}

static void ran(unsigned cpu, void *address)
{
    (void)cpu;
    record((uint32_t)(uintptr_t)address, RUN);
}

static void touched(unsigned cpu, uint32_t info, uint64_t address, void *unused)
{
    (void)cpu, (void)unused;
    record((uint32_t)address, qemu_plugin_mem_is_store(info) ? STORE : LOAD);
}

/* Prepare a block of instructions that is about to run for the first time. */
static void instrument(plugin_id id, struct block *block)
{
    (void)id;
    size_t n = qemu_plugin_tb_n_insns(block);
    for (size_t i = 0; i < n; i++) {
        struct instruction *instruction = qemu_plugin_tb_get_insn(block, i);
        uintptr_t address = (uintptr_t)qemu_plugin_insn_vaddr(instruction);
        if (counts) /* each for itself: a block may hold one that it leaves to the next, at the end of a page */
            qemu_plugin_register_vcpu_insn_exec_inline(instruction, INLINE_ADD_U64, &instructions, 1);
        if (address == start)
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, entered, NO_REGISTERS, NULL);
        if (code)
            fprintf(code, "%llu\n", (unsigned long long)address);
        if (tracing) {
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, ran, NO_REGISTERS, (void *)address);
            qemu_plugin_register_vcpu_mem_cb(instruction, touched, NO_REGISTERS, READS_AND_WRITES, NULL);
        }
    }
}

static void ended(plugin_id id, void *unused)
{
    (void)id, (void)unused;
    if (calls < last)
        fprintf(stderr, "calls: the program ended in call %u, before call %u began\n", calls, last);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info;
    own_id = id;
    for (int i = 0; i < argc; i++) {
        char *value = strchr(argv[i], '=') + 1;
        if (!strncmp(argv[i], "start=", 6))
            start = (uint32_t)strtoul(value, NULL, 16);
        else if (!strncmp(argv[i], "first=", 6))
            first = (uint32_t)strtoul(value, NULL, 10);
        else if (!strncmp(argv[i], "last=", 5))
            last = (uint32_t)strtoul(value, NULL, 10);
        else if (!strncmp(argv[i], "counts=", 7))
            counts = fopen(value, "w");
        else if (!strncmp(argv[i], "code=", 5))
            code = fopen(value, "w");
        else if (!strncmp(argv[i], "trace=", 6))
            trace = fopen(value, "wb");
    }
    if (!trace && !counts)
        return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, instrument);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
