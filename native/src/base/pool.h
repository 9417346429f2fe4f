/* Threads that share out pieces of work, and sleep in between. */
#ifndef CORDEE_POOL_H
#define CORDEE_POOL_H

#if !defined(CORDEE_ONE_THREAD)
#include <pthread.h>
#include <stdatomic.h>
#endif
#include <stdbool.h>
#include <stdint.h>

/* More than any machine this runs well on: the work of a small model does not divide further. */
#define THREADS_LIMIT 256u

/* Piece `piece` of some work, on thread `thread`. */
typedef void work_function(void *argument, uint32_t piece, uint32_t thread);

#if defined(CORDEE_ONE_THREAD)
struct pool {
    uint32_t threads;
};
#else
struct pool {
    uint32_t threads; /* the caller's own included */
    /* The job. Written by the caller while no piece is left to take, read by whoever took one. */
    work_function *_Atomic work;
    void *_Atomic argument;
    atomic_uint count;
    _Atomic uint64_t state; /* jobs so far << 32 | pieces left to take */
    atomic_uint done;       /* pieces of the job that are finished */
    atomic_uint numbers;    /* handed to threads as they start */
    atomic_uint sleepers;
    atomic_bool ending;
    pthread_mutex_t mutex;
    pthread_cond_t woken;
    pthread_t handles[THREADS_LIMIT];
};
#endif

/* Start threads - 1 threads; false if the machine gives none (those that started are ended again). */
bool pool_start(struct pool *pool, uint32_t threads);
void pool_end(struct pool *pool);

/* Call work(argument, piece, thread) for pieces 0 to count - 1, on whichever threads are awake, and return when all
 * are done. The caller is thread 0. What was written before is seen by the pieces; what they wrote is seen after. */
void pool_run(struct pool *pool, work_function *work, void *argument, uint32_t count);

#endif
