/* An approximate Pentium II, driven by a trace: how many clocks the calls in it take.
 *
 *     model UOPS DRAM_CLOCKS BUS_CLOCKS [DRAM_CLOCKS BUS_CLOCKS]... < TRACE
 *
 * UOPS is what uops.py writes, TRACE what calls.c writes. One line for each call and each memory, in turn:
 * "clocks instructions uops l1_misses l2_misses mispredictions".
 *
 * Instructions are fetched in blocks of 16 bytes and decoded 4-1-1, three uops a clock are renamed into a reorder
 * buffer of 40 and 20 reservation stations, five ports execute them, three a clock retire in order. The stack of
 * the x87 is renamed too, so that fxch is free. Branches are predicted from four bits of history each. Not
 * modelled: instruction cache and TLB misses, partial register stalls, misaligned and bank-conflicting accesses.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

enum { REORDER_BUFFER = 40, STATIONS = 20, RENAMED = 3, RETIRED = 3, MISPREDICTION_CLOCKS = 9, DECODE_CLOCKS = 3 };
enum { DECODE_QUEUE_CLOCKS = 8, FORWARDING_CLOCKS = 3 };
enum { REGISTERS = 48, X87_FIRST = 24, MAX_UOPS = 64, MAX_TOUCHED = 64 };
enum { RUN = 0, LOAD = 1, STORE = 2, CALL = 3 }; /* kinds of records, see calls.c */
enum { NO_PORT = 0, PORT_0 = 1, PORT_1 = 2, PORT_0_OR_1 = 3, PORT_2 = 4, PORT_3 = 8, PORT_4 = 16 };
enum { NO_MEMORY = 0, LOADS = 1, STORE_ADDRESS = 2, STORE_DATA = 3 };
enum { NO_BRANCH = 0, CONDITIONAL = 1 };
enum { PORTS = 5, PORT_RING = 1 << 16, PORT_PAST_CLOCKS = 2000 };
enum { FIGURES = 6, MEMORIES_MAX = 4 };
enum { STORES = 1 << 16, HISTORIES = 512, COUNTERS = 4096 };

typedef struct {
    int port, latency, occupancy, memory, n_sources, n_targets;
    int sources[4], targets[2];
} uop;

typedef struct {
    int size, n, branch, stack;
    uop *uops;
} instruction;

/* What the processor is in the middle of. All times are clocks. */
typedef struct {
    memory memory;
    uint64_t fetched, block_fetched, redirected, renamed, retired;
    int decoded_now, renamed_now, retired_now;
    uint32_t block;
    uint64_t n_uops, retires[REORDER_BUFFER];
    uint64_t waiting[REORDER_BUFFER]; /* dispatch clocks later than `renamed` */
    int n_waiting;
    uint64_t ready[REGISTERS];
    int top; /* of the x87 stack */
    unsigned char busy[PORTS][PORT_RING];
    uint64_t cleared;
    uint32_t store_address[STORES];
    uint64_t store_ready[STORES];
    unsigned char history[HISTORIES], counter[COUNTERS];
    uint64_t n_instructions, mispredictions;
    uint64_t reported[FIGURES];
} processor;

typedef struct {
    uint32_t loads[MAX_TOUCHED], stores[MAX_TOUCHED];
    int n_loads, n_stores, next_load, next_store;
} touched;

static instruction *table; /* [last_address - first_address + 1] */
static uint32_t first_address, last_address;

static void fail(const char *what)
{
    fprintf(stderr, "pentium2_model: %s\n", what);
    exit(1);
}

static void *allocate(size_t count, size_t size)
{
    void *made = calloc(count, size);
    if (made == NULL)
        fail("no memory");
    return made;
}

static int number(FILE *file)
{
    int value;
    if (fscanf(file, "%d", &value) != 1)
        fail("a damaged table of uops");
    return value;
}

static void read_uop(FILE *file, uop *u)
{
    u->port = number(file);
    u->latency = number(file);
    u->occupancy = number(file);
    u->memory = number(file);
    u->n_sources = number(file);
    for (int i = 0; i < u->n_sources; i++)
        u->sources[i] = number(file);
    u->n_targets = number(file);
    for (int i = 0; i < u->n_targets; i++)
        u->targets[i] = number(file);
}

/* "FIRST LAST", then for each instruction "ADDRESS SIZE UOPS BRANCH STACK" and its uops. */
static void read_table(const char *path)
{
    FILE *file = fopen(path, "r");
    if (file == NULL)
        fail("the table of uops cannot be read");
    first_address = (uint32_t)number(file);
    last_address = (uint32_t)number(file);
    table = allocate(last_address - first_address + 1, sizeof *table);
    uint32_t address;
    while (fscanf(file, "%u", &address) == 1) {
        instruction *made = table + (address - first_address);
        made->size = number(file);
        made->n = number(file);
        made->branch = number(file);
        made->stack = number(file);
        made->uops = allocate((size_t)made->n, sizeof *made->uops);
        for (int i = 0; i < made->n; i++)
            read_uop(file, made->uops + i);
    }
    fclose(file);
}

static void fetch_block(processor *p, uint32_t block)
{
    if (block == p->block)
        return;
    if (p->fetched < p->block_fetched + 1) {
        p->fetched = p->block_fetched + 1;
        p->decoded_now = 0;
    }
    p->block_fetched = p->fetched;
    p->block = block;
}

static void decode(processor *p, uint32_t address, const instruction *now)
{
    if (p->redirected > p->fetched) {
        p->fetched = p->redirected;
        p->decoded_now = 0;
    }
    fetch_block(p, address >> 4);
    fetch_block(p, (address + (uint32_t)now->size - 1) >> 4);
    if (p->decoded_now == 0) {
        p->decoded_now = 1;
    } else if (now->n > 1 || p->decoded_now >= 3) {
        p->fetched++;
        p->decoded_now = 1;
    } else {
        p->decoded_now++;
    }
    if (now->n > 4) { /* microcode */
        p->fetched += (uint64_t)(now->n - 1) / 4;
        p->decoded_now = 3;
    }
}

static void rename_not_before(processor *p, uint64_t clock)
{
    if (p->renamed < clock) {
        p->renamed = clock;
        p->renamed_now = 0;
    }
}

/* Wait for a place in the reorder buffer and a reservation station. */
static void rename_uop(processor *p)
{
    if (p->renamed_now == RENAMED)
        rename_not_before(p, p->renamed + 1);
    if (p->n_uops >= REORDER_BUFFER)
        rename_not_before(p, p->retires[p->n_uops % REORDER_BUFFER]);
    for (;;) {
        uint64_t soonest = UINT64_MAX;
        int kept = 0;
        for (int i = 0; i < p->n_waiting; i++) {
            if (p->waiting[i] <= p->renamed)
                continue;
            p->waiting[kept++] = p->waiting[i];
            if (p->waiting[i] < soonest)
                soonest = p->waiting[i];
        }
        p->n_waiting = kept;
        if (kept < STATIONS)
            break;
        rename_not_before(p, soonest);
    }
    p->renamed_now++;
}

static uint64_t reserve(processor *p, int port, uint64_t when, int clocks)
{
    for (int run = 0; run < clocks;) {
        if (p->busy[port][(when + (uint64_t)run) % PORT_RING]) {
            when++;
            run = 0;
        } else {
            run++;
        }
    }
    for (int run = 0; run < clocks; run++)
        p->busy[port][(when + (uint64_t)run) % PORT_RING] = 1;
    return when;
}

static uint64_t dispatch(processor *p, const uop *u, uint64_t when)
{
    switch (u->port) {
    case NO_PORT: return when;
    case PORT_0: return reserve(p, 0, when, u->occupancy);
    case PORT_1: return reserve(p, 1, when, u->occupancy);
    case PORT_2: return reserve(p, 2, when, u->occupancy);
    case PORT_3: return reserve(p, 3, when, u->occupancy);
    case PORT_4: return reserve(p, 4, when, u->occupancy);
    default: break;
    }
    for (;; when++)
        for (int port = 1; port >= 0; port--) /* port 0 has more that only it can do */
            if (!p->busy[port][when % PORT_RING])
                return reserve(p, port, when, 1);
}

static int physical(const processor *p, int name)
{
    int is_x87 = name >= X87_FIRST && name < X87_FIRST + 8;
    return is_x87 ? X87_FIRST + ((name - X87_FIRST + p->top) & 7) : name;
}

static uint64_t access(processor *p, const uop *u, touched *memory, uint64_t when, uint64_t done)
{
    if (u->memory == LOADS && memory->next_load < memory->n_loads) {
        uint32_t address = memory->loads[memory->next_load++], slot = (address >> 2) % STORES;
        done = memory_access(&p->memory, address, when, 0);
        if (p->store_address[slot] == address >> 2 && p->store_ready[slot] + FORWARDING_CLOCKS > done)
            done = p->store_ready[slot] + FORWARDING_CLOCKS;
    } else if (u->memory == STORE_DATA && memory->next_store < memory->n_stores) {
        uint32_t address = memory->stores[memory->next_store++], slot = (address >> 2) % STORES;
        memory_access(&p->memory, address, when, 1);
        p->store_address[slot] = address >> 2;
        p->store_ready[slot] = done;
    }
    return done;
}

static void retire(processor *p, uint64_t done)
{
    if (done > p->retired) {
        p->retired = done;
        p->retired_now = 0;
    }
    if (p->retired_now == RETIRED) {
        p->retired++;
        p->retired_now = 0;
    }
    p->retired_now++;
    p->retires[p->n_uops % REORDER_BUFFER] = p->retired;
    p->n_uops++;
}

/* Run a uop: the clock when its result is there. */
static uint64_t run_uop(processor *p, const uop *u, touched *memory)
{
    rename_uop(p);
    uint64_t when = p->renamed + 1;
    for (int i = 0; i < u->n_sources; i++) {
        uint64_t ready = p->ready[physical(p, u->sources[i])];
        when = ready > when ? ready : when;
    }
    when = dispatch(p, u, when);
    uint64_t done = access(p, u, memory, when, u->port == NO_PORT ? when : when + (uint64_t)u->latency);
    for (int i = 0; i < u->n_targets; i++)
        p->ready[physical(p, u->targets[i])] = done;
    p->waiting[p->n_waiting++] = when; /* fewer than STATIONS wait already */
    retire(p, done);
    return done;
}

static void branch(processor *p, uint32_t address, int taken, uint64_t resolved)
{
    unsigned char *history = p->history + address % HISTORIES;
    unsigned char *counter = p->counter + (address % HISTORIES * 16 + *history) % COUNTERS;
    if ((*counter >= 2) != taken) {
        p->mispredictions++;
        p->redirected = resolved + MISPREDICTION_CLOCKS;
    } else if (taken) { /* what was decoded behind it this clock is lost */
        p->fetched++;
        p->decoded_now = 0;
    }
    if (taken && *counter < 3)
        ++*counter;
    else if (!taken && *counter > 0)
        --*counter;
    *history = (unsigned char)((*history << 1 | taken) & 15);
}

static void forget_past(processor *p)
{
    uint64_t past = p->renamed > PORT_PAST_CLOCKS ? p->renamed - PORT_PAST_CLOCKS : 0;
    for (; p->cleared < past; p->cleared++)
        for (int port = 0; port < PORTS; port++)
            p->busy[port][p->cleared % PORT_RING] = 0;
}

static void run(processor *p, uint32_t address, uint32_t next, touched *memory)
{
    static uop unknown_uop = {.port = PORT_0_OR_1, .latency = 1, .occupancy = 1};
    static const instruction unknown = {.size = 1, .n = 1, .uops = &unknown_uop};
    int known = address >= first_address && address <= last_address && table[address - first_address].n > 0;
    const instruction *now = known ? table + (address - first_address) : &unknown;
    uint64_t done = 0;
    p->n_instructions++;
    decode(p, address, now);
    rename_not_before(p, p->fetched + DECODE_CLOCKS);
    for (int i = 0; i < now->n; i++)
        done = run_uop(p, now->uops + i, memory);
    p->top = (p->top - now->stack) & 7;
    forget_past(p);
    if (now->branch == CONDITIONAL) {
        branch(p, address, next != address + (uint32_t)now->size, done);
    } else if (now->branch != NO_BRANCH) {
        p->fetched++;
        p->decoded_now = 0;
    }
    if (p->renamed > p->fetched + DECODE_QUEUE_CLOCKS)
        p->fetched = p->renamed - DECODE_QUEUE_CLOCKS;
}

/* Print what has happened since the last report. */
static void report(processor *p)
{
    uint64_t now[FIGURES] = {p->retired,           p->n_instructions,   p->n_uops,
                             p->memory.l1_misses, p->memory.l2_misses, p->mispredictions};
    for (int i = 0; i < FIGURES; i++) {
        printf("%llu%c", (unsigned long long)(now[i] - p->reported[i]), i < FIGURES - 1 ? ' ' : '\n');
        p->reported[i] = now[i];
    }
}

/* All processors do the same; only their memories differ. */
static void run_all(processor **all, int n, uint32_t address, uint32_t next, const touched *memory)
{
    for (int i = 0; i < n; i++) {
        touched own = *memory;
        run(all[i], address, next, &own);
    }
}

static void read_trace(processor **all, int n)
{
    static uint32_t records[1 << 16][2];
    touched memory = {.n_loads = 0};
    uint32_t address = 0;
    int pending = 0, calls = 0;
    for (size_t count; (count = fread(records, sizeof *records, 1 << 16, stdin)) > 0;)
        for (size_t i = 0; i < count; i++) {
            uint32_t value = records[i][0], kind = records[i][1];
            if (kind == LOAD && memory.n_loads < MAX_TOUCHED)
                memory.loads[memory.n_loads++] = value;
            if (kind == STORE && memory.n_stores < MAX_TOUCHED)
                memory.stores[memory.n_stores++] = value;
            if (kind != RUN && kind != CALL)
                continue;
            if (pending)
                run_all(all, n, address, value, &memory);
            memory.n_loads = memory.n_stores = 0;
            pending = kind == RUN;
            address = value;
            if (kind == CALL && calls++)
                for (int k = 0; k < n; k++)
                    report(all[k]);
        }
    if (pending)
        run_all(all, n, address, address, &memory);
}

int main(int argc, char **argv)
{
    processor *all[MEMORIES_MAX];
    int n = (argc - 2) / 2;
    if (argc < 4 || argc % 2 || n > MEMORIES_MAX)
        fail("usage: model UOPS DRAM_CLOCKS BUS_CLOCKS [DRAM_CLOCKS BUS_CLOCKS]... < TRACE");
    read_table(argv[1]);
    for (int i = 0; i < n; i++) {
        all[i] = allocate(1, sizeof *all[i]);
        all[i]->memory = memory_make((uint32_t)atoi(argv[2 + 2 * i]), (uint32_t)atoi(argv[3 + 2 * i]));
    }
    read_trace(all, n);
    for (int i = 0; i < n; i++)
        report(all[i]);
    return 0;
}
