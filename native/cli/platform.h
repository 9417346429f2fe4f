/* What the systems call differently: time, memory, and reading ahead in a mapped file. */
#ifndef CORDEE_PLATFORM_H
#define CORDEE_PLATFORM_H

#include <stddef.h>
#include <stdint.h>

/* Of some clock that runs evenly. */
double platform_seconds(void);

/* Memory that could be had without anybody else's being written to disk; UINT64_MAX where the system does not say. */
uint64_t platform_free_bytes(void);

/* The most memory that this program has had at once, or 0 where the system does not say. */
uint64_t platform_peak_bytes(void);

/* Begin to read these bytes of a mapped file from disk, once those of the call before have been read, and return. */
void platform_read_ahead(const void *bytes, size_t nbytes);

/* These bytes of a mapped file are not wanted soon. */
void platform_let_go(const void *bytes, size_t nbytes);

/* Text goes to the console as it is, in UTF-8 where the console can be told. */
void platform_prepare_console(void);

#endif
