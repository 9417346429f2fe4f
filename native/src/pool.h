/* Threads that run one function together, with barriers inside, and sleep in between. */
#ifndef CORDEE_POOL_H
#define CORDEE_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* More than any machine this runs well on: the work of a small model does not divide further. */
#define THREADS_LIMIT 256u

/* Somewhere to wait for a number to change: a short spin, then sleep. */
struct gate_wait {
    atomic_uint value;
    atomic_uint sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
};

struct pool {
    uint32_t threads; /* the caller's own included */
    void (*run)(void *argument, uint32_t thread);
    void *argument;
    bool ending;
    atomic_uint arrived;      /* at the current barrier */
    atomic_uint next;         /* the next piece of work between two barriers */
    atomic_uint numbers;      /* handed to threads as they start */
    struct gate_wait start;   /* changes when there is work */
    struct gate_wait barrier; /* changes when all have arrived */
    pthread_t handles[THREADS_LIMIT];
};

/* Start threads - 1 threads; false if the machine gives none (those that started are ended again). */
bool pool_start(struct pool *pool, uint32_t threads);
void pool_end(struct pool *pool);

/* Call run(argument, thread) on every thread, the caller being thread 0, and wait for all. */
void pool_run(struct pool *pool, void (*run)(void *argument, uint32_t thread), void *argument);

/* Inside a run: wait until all threads are here. Everything written before is seen after. */
void pool_barrier(struct pool *pool);

/* Inside a run: numbers 0, 1, 2, ... handed out to whoever asks, anew after each barrier. Threads that another
 * process keeps waiting get fewer. */
static inline uint32_t pool_next(struct pool *pool)
{
    return atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
}

#endif
