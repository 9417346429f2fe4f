/* Threads that run one function together.
 *
 * A decode step has some ten barriers a layer, so a barrier must cost well under a microsecond when all threads run;
 * but the machine is not ours alone, so whoever waits longer than SPINS sleeps until it is woken.
 */
#include "pool.h"

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* Some 50 microseconds: longer than a barrier takes among running threads, short beside a time slice. */
#define SPINS 2000

static void gate_open(struct gate_wait *gate)
{
    atomic_init(&gate->value, 0);
    atomic_init(&gate->sleepers, 0);
    pthread_mutex_init(&gate->mutex, NULL);
    pthread_cond_init(&gate->changed, NULL);
}

static void gate_close(struct gate_wait *gate)
{
    pthread_cond_destroy(&gate->changed);
    pthread_mutex_destroy(&gate->mutex);
}

static void gate_change(struct gate_wait *gate)
{
    /* Sequentially consistent, like the sleepers' own order: either we see the sleeper, or it sees the new value. */
    atomic_fetch_add(&gate->value, 1);
    if (atomic_load(&gate->sleepers) == 0)
        return;
    pthread_mutex_lock(&gate->mutex);
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->mutex);
}

static void gate_await(struct gate_wait *gate, unsigned old)
{
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&gate->value, memory_order_acquire) != old)
            return;
        PAUSE();
    }
    pthread_mutex_lock(&gate->mutex);
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->value) == old)
        pthread_cond_wait(&gate->changed, &gate->mutex);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->mutex);
}

void pool_barrier(struct pool *pool)
{
    if (pool->threads == 1) {
        atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
        return;
    }
    const unsigned old = atomic_load_explicit(&pool->barrier.value, memory_order_relaxed);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 < pool->threads) {
        gate_await(&pool->barrier, old);
        return;
    }
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    gate_change(&pool->barrier);
}

static void *thread_main(void *argument)
{
    struct pool *pool = argument;
    const uint32_t thread = atomic_fetch_add(&pool->numbers, 1) + 1;
    for (unsigned seen = 0;; seen++) {
        gate_await(&pool->start, seen);
        if (pool->ending)
            return NULL;
        pool->run(pool->argument, thread);
        pool_barrier(pool);
    }
}

void pool_run(struct pool *pool, void (*run)(void *argument, uint32_t thread), void *argument)
{
    pool->run = run;
    pool->argument = argument;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    if (pool->threads > 1)
        gate_change(&pool->start);
    run(argument, 0);
    pool_barrier(pool);
}

static void end_threads(struct pool *pool, uint32_t started)
{
    pool->ending = true;
    gate_change(&pool->start);
    for (uint32_t i = 0; i < started; i++)
        pthread_join(pool->handles[i], NULL);
    gate_close(&pool->start);
    gate_close(&pool->barrier);
}

bool pool_start(struct pool *pool, uint32_t threads)
{
    pool->threads = threads;
    pool->ending = false;
    atomic_init(&pool->arrived, 0);
    atomic_init(&pool->next, 0);
    atomic_init(&pool->numbers, 0);
    gate_open(&pool->start);
    gate_open(&pool->barrier);
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
