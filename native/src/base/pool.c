/* Threads that share out pieces of work.
 *
 * A decode step has some five jobs a layer, each of some ten to a hundred microseconds, so a job must begin and end in
 * well under one; but the machine is not ours alone. So nobody waits for a thread, only for pieces: the caller takes
 * pieces like everyone, and a thread that sleeps, or that the system keeps from running, is not missed.
 *
 * The state counts jobs and the pieces left, in one number: who exchanges it for one piece less has that piece, and
 * knows that the job it read belongs to it, since the next job is written only when no piece is left.
 */
#include "pool.h"

#if defined(CORDEE_ONE_THREAD)
/* For machines without threads, or with nothing to gain by them. */
bool pool_start(struct pool *pool, uint32_t threads)
{
    pool->threads = threads;
    return threads == 1;
}

void pool_end(struct pool *pool)
{
    (void)pool;
}

void pool_run(struct pool *pool, work_function *work, void *argument, uint32_t count)
{
    (void)pool;
    for (uint32_t piece = 0; piece < count; piece++)
        work(argument, piece, 0);
}
#else
#include <sched.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* Some 20 to 50 microseconds: from one job to the next, short beside a time slice. */
#define SPINS 1000

/* Takes and does one piece; false if none is left. */
static bool do_piece(struct pool *pool, uint32_t thread)
{
    uint64_t state = atomic_load_explicit(&pool->state, memory_order_acquire);
    for (;;) {
        const uint32_t left = (uint32_t)state;
        if (left == 0)
            return false;
        const uint32_t piece = atomic_load_explicit(&pool->count, memory_order_relaxed) - left;
        work_function *work = atomic_load_explicit(&pool->work, memory_order_relaxed);
        void *argument = atomic_load_explicit(&pool->argument, memory_order_relaxed);
        if (atomic_compare_exchange_weak_explicit(&pool->state, &state, state - 1, memory_order_acquire,
                                                  memory_order_acquire)) {
            work(argument, piece, thread);
            atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
            return true;
        }
    }
}

static bool is_idle(struct pool *pool)
{
    return (uint32_t)atomic_load(&pool->state) == 0 && !atomic_load(&pool->ending);
}

/* A short spin, then sleep, until there is a piece to take or the end. */
static void await_work(struct pool *pool)
{
    for (int spin = 0; spin < SPINS; spin++) {
        if (!is_idle(pool))
            return;
        PAUSE();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (is_idle(pool))
        pthread_cond_wait(&pool->woken, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

/* Whoever sleeps has either seen what was written before, or is seen here: both sides are sequentially consistent. */
static void wake(struct pool *pool)
{
    if (atomic_load(&pool->sleepers) == 0)
        return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->woken);
    pthread_mutex_unlock(&pool->mutex);
}

static void *thread_main(void *argument)
{
    struct pool *pool = argument;
    const uint32_t thread = atomic_fetch_add(&pool->numbers, 1) + 1;
    while (!atomic_load(&pool->ending))
        if (!do_piece(pool, thread))
            await_work(pool);
    return NULL;
}

void pool_run(struct pool *pool, work_function *work, void *argument, uint32_t count)
{
    if (count <= 1 || pool->threads == 1) {
        for (uint32_t piece = 0; piece < count; piece++)
            work(argument, piece, 0);
        return;
    }
    const uint64_t jobs = (atomic_load_explicit(&pool->state, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&pool->work, work, memory_order_relaxed);
    atomic_store_explicit(&pool->argument, argument, memory_order_relaxed);
    atomic_store_explicit(&pool->count, count, memory_order_relaxed);
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    atomic_store(&pool->state, jobs << 32 | count);
    wake(pool);
    while (do_piece(pool, 0))
        ;
    for (int spin = 0; atomic_load_explicit(&pool->done, memory_order_acquire) < count; spin++) {
        if (spin < SPINS)
            PAUSE();
        else
            sched_yield(); /* whoever has the last piece may be waiting for this very core */
    }
}

static void end_threads(struct pool *pool, uint32_t started)
{
    atomic_store(&pool->ending, true);
    wake(pool);
    for (uint32_t i = 0; i < started; i++)
        pthread_join(pool->handles[i], NULL);
    pthread_cond_destroy(&pool->woken);
    pthread_mutex_destroy(&pool->mutex);
}

bool pool_start(struct pool *pool, uint32_t threads)
{
    pool->threads = threads;
    atomic_init(&pool->work, NULL);
    atomic_init(&pool->argument, NULL);
    atomic_init(&pool->count, 0);
    atomic_init(&pool->state, 0);
    atomic_init(&pool->done, 0);
    atomic_init(&pool->numbers, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->ending, false);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->woken, NULL);
    for (uint32_t i = 0; i + 1 < threads; i++) {
        if (pthread_create(&pool->handles[i], NULL, thread_main, pool) != 0) {
            end_threads(pool, i);
            return false;
        }
    }
    return true;
}

void pool_end(struct pool *pool)
{
    end_threads(pool, pool->threads - 1);
}
#endif
