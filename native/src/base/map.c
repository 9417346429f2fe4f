/* The one place where the library touches a file: mapping it. */
#if !defined(_WIN32)
#define _DEFAULT_SOURCE /* madvise */
#endif
#include <errno.h>
#include <stdint.h>
#include <string.h>

#include "error.h"
#include "ternary.h"

#if defined(_WIN32)
#include <windows.h>

ternary_status ternary_file_map(const char *path, ternary_file *file, ternary_error *error)
{
    *file = (ternary_file){0};
    HANDLE handle = CreateFileA(path, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    unsigned reason = (unsigned)GetLastError();
    if (handle == INVALID_HANDLE_VALUE)
        return reason == ERROR_FILE_NOT_FOUND || reason == ERROR_PATH_NOT_FOUND
                   ? ternary_fail(error, TERNARY_SYSTEM, "%.200s cannot be opened: there is no such file", path)
                   : ternary_fail(error, TERNARY_SYSTEM, "%.200s cannot be opened: error %u of Windows", path, reason);
    DWORD high = 0;
    const DWORD low = GetFileSize(handle, &high);
    const uint64_t nbytes = (uint64_t)high << 32 | low;
    if ((low == INVALID_FILE_SIZE && GetLastError() != NO_ERROR) || nbytes == 0 || nbytes > SIZE_MAX) {
        CloseHandle(handle);
        return ternary_fail(error, TERNARY_BAD_FILE,
                            "%.200s is empty, or no file, or too large for this machine", path);
    }
    HANDLE mapping = CreateFileMappingA(handle, NULL, PAGE_READONLY, 0, 0, NULL);
    if (mapping != NULL)
        file->bytes = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    reason = (unsigned)GetLastError();
    if (mapping != NULL)
        CloseHandle(mapping); /* the view keeps it alive */
    CloseHandle(handle);
    if (file->bytes == NULL)
        return ternary_fail(error, TERNARY_SYSTEM, "%.200s cannot be mapped: error %u of Windows", path, reason);
    file->nbytes = (size_t)nbytes;
    return TERNARY_OK;
}

void ternary_file_unmap(ternary_file *file)
{
    if (file->bytes != NULL)
        UnmapViewOfFile(file->bytes);
    *file = (ternary_file){0};
}
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

ternary_status ternary_file_map(const char *path, ternary_file *file, ternary_error *error)
{
    *file = (ternary_file){0};
    const int descriptor = open(path, O_RDONLY);
    struct stat status;
    if (descriptor < 0)
        return ternary_fail(error, TERNARY_SYSTEM, "%.200s cannot be opened: %s", path, strerror(errno));
    if (fstat(descriptor, &status) != 0 || status.st_size <= 0 || (uint64_t)status.st_size > SIZE_MAX) {
        close(descriptor);
        return ternary_fail(error, TERNARY_BAD_FILE,
                            "%.200s is empty, or no file, or too large for this machine", path);
    }
    void *bytes = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    const int reason = errno;
    close(descriptor);
    if (bytes == MAP_FAILED)
        return ternary_fail(error, TERNARY_SYSTEM, "%.200s cannot be mapped: %s", path, strerror(reason));
#if defined(MADV_HUGEPAGE)
    madvise(bytes, (size_t)status.st_size, MADV_HUGEPAGE); /* where the file system can; refused elsewhere, harmless */
#endif
    *file = (ternary_file){bytes, (size_t)status.st_size};
    return TERNARY_OK;
}

void ternary_file_unmap(ternary_file *file)
{
    if (file->bytes != NULL)
        munmap((void *)(uintptr_t)file->bytes, file->nbytes);
    *file = (ternary_file){0};
}
#endif
