/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bzImages from strangers: whatever the bytes, sm_unpack_kernel returns an
 * answer, and on failure has a line to say and has left no file behind. The
 * input is wrapped into a valid set-up header in half of the runs, or the
 * magic numbers would keep the fuzzer out of the decompressors.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "unpack_kernel.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SETUP_BYTES = 1024 };

static void put_le32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
    p[2] = (uint8_t)(v >> 16);
    p[3] = (uint8_t)(v >> 24);
}

static void write_header(int fd, size_t payload_bytes)
{
    uint8_t setup[SETUP_BYTES] = {0};

    setup[0x1f1] = 1;
    setup[0x1fe] = 0x55;
    setup[0x1ff] = 0xaa;
    memcpy(setup + 0x202, "HdrS", 4);
    setup[0x206] = 0x0f;
    setup[0x207] = 0x02;
    put_le32(setup + 0x24c, (uint32_t)payload_bytes);
    if (write(fd, setup, sizeof(setup)) != sizeof(setup))
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char in[64], out[64], err[256];
    int fd;

    if (size < 1)
        return 0;
    fd = memfd_create("bzimage", MFD_CLOEXEC);
    if (fd < 0)
        abort();
    if (data[0] & 1)
        write_header(fd, size - 1);
    if (write(fd, data + 1, size - 1) != (ssize_t)(size - 1))
        abort();
    snprintf(in, sizeof(in), "/proc/self/fd/%d", fd);
    snprintf(out, sizeof(out), "/dev/shm/sm-fuzz-unpack.%d", (int)getpid());
    if (sm_unpack_kernel(in, out, err, sizeof(err)) == 0) {
        if (unlink(out))
            abort();
    } else if (!err[0] || strchr(err, '\n') || access(out, F_OK) == 0) {
        abort();
    }
    close(fd);
    return 0;
}
