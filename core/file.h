/* SPDX-License-Identifier: Apache-2.0 */
/* Whole reads and writes at a place of a file. Threads: any. */
#ifndef SM_FILE_H
#define SM_FILE_H

#include <stddef.h>
#include <stdint.h>

/* All of it, or -errno; -EIO: the file ends before. */
int sm_file_read(int fd, void *buf, size_t len, uint64_t offset);
int sm_file_write(int fd, const void *buf, size_t len, uint64_t offset);

#endif
