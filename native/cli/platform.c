/* What the systems call differently. Windows: nothing that Windows 98 did not have (tests/pentium2/test_pentium2.py). */
#if !defined(_WIN32)
#define _DEFAULT_SOURCE /* madvise */
#endif
#include "platform.h"

#if defined(_WIN32)
#include <windows.h>

#define PAGE_BYTES 4096u

double platform_seconds(void)
{
    LARGE_INTEGER ticks, frequency;
    if (QueryPerformanceFrequency(&frequency) && QueryPerformanceCounter(&ticks))
        return (double)ticks.QuadPart / (double)frequency.QuadPart;
    return GetTickCount() / 1000.0;
}

uint64_t platform_free_bytes(void)
{
    MEMORYSTATUS status = {.dwLength = sizeof status};
    GlobalMemoryStatus(&status);
    return status.dwAvailPhys;
}

uint64_t platform_peak_bytes(void)
{
    return 0;
}

/* What a thread reads ahead. One at a time: a second one would only make the disk's head go to and fro. */
static struct {
    const volatile uint8_t *bytes;
    size_t nbytes;
    HANDLE thread;
} ahead;

static DWORD WINAPI touch(LPVOID nothing)
{
    (void)nothing;
    for (size_t at = 0; at < ahead.nbytes; at += PAGE_BYTES)
        (void)ahead.bytes[at];
    return 0;
}

void platform_read_ahead(const void *bytes, size_t nbytes)
{
    DWORD number;
    if (ahead.thread != NULL) {
        WaitForSingleObject(ahead.thread, INFINITE);
        CloseHandle(ahead.thread);
    }
    ahead.bytes = bytes;
    ahead.nbytes = nbytes;
    ahead.thread = CreateThread(NULL, 0, touch, NULL, 0, &number);
}

void platform_let_go(const void *bytes, size_t nbytes)
{
    (void)bytes; /* the system takes pages back when it wants them */
    (void)nbytes;
}

void platform_prepare_console(void)
{
    SetConsoleOutputCP(CP_UTF8); /* refused by Windows 98, which shows accents as it can */
}
#else
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

double platform_seconds(void)
{
    struct timeval now;
    gettimeofday(&now, NULL);
    return (double)now.tv_sec + (double)now.tv_usec * 1e-6;
}

/* What a line "key:   number kB" of a file of the kernel's says, or something else if there is none. */
static uint64_t kernel_bytes(const char *path, const char *key, uint64_t otherwise)
{
    char line[128];
    unsigned long kilobytes;
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return otherwise;
    while (fgets(line, sizeof line, file) != NULL)
        if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), ": %lu", &kilobytes) == 1)
            otherwise = (uint64_t)kilobytes * 1024;
    fclose(file);
    return otherwise;
}

uint64_t platform_free_bytes(void)
{
    return kernel_bytes("/proc/meminfo", "MemAvailable", UINT64_MAX);
}

uint64_t platform_peak_bytes(void)
{
    return kernel_bytes("/proc/self/status", "VmHWM", 0);
}

/* The whole pages around, or with `inside` within, some bytes. */
static void advise(const void *bytes, size_t nbytes, int advice, int inside)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)bytes, end = first + nbytes;
    const uintptr_t from = inside ? (first + page - 1) / page * page : first / page * page;
    const uintptr_t to = inside ? end / page * page : (end + page - 1) / page * page;
    if (from < to)
        madvise((void *)from, to - from, advice);
}

void platform_read_ahead(const void *bytes, size_t nbytes)
{
    advise(bytes, nbytes, MADV_WILLNEED, 0);
}

void platform_let_go(const void *bytes, size_t nbytes)
{
    advise(bytes, nbytes, MADV_DONTNEED, 1);
}

void platform_prepare_console(void)
{
}
#endif
