/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the reader of layer indexes and, with what it accepts, the merge and
 * the EROFS writer. The checksum is put right, so that everything behind it is
 * reached. A forged index may be refused; it may not crash anything.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "index_format.h"
#include "merge.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[64], layer_data[96], layer_index[96], meta[96];

static void set_up(void)
{
    const char *base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";

    snprintf(dir, sizeof(dir), "%s/sm-index-fuzz-XXXXXX", base);
    if (!mkdtemp(dir))
        abort();
    snprintf(layer_data, sizeof(layer_data), "%s/data", dir);
    snprintf(layer_index, sizeof(layer_index), "%s/index", dir);
    snprintf(meta, sizeof(meta), "%s/meta", dir);
}

static void tear_down(void)
{
    unlink(layer_data);
    unlink(layer_index);
    rmdir(dir);
}

static void write_file(const char *path, const uint8_t *data, size_t size, uint64_t length)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    if (fd < 0 || sm_image_write_all(fd, data, size, 0) < 0 || ftruncate(fd, (off_t)length) < 0)
        abort();
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *layers[2] = { dir, dir };
    struct sm_merge_config merge = { .layers = layers, .n_layers = 2, .out = meta };
    struct sm_merge_result merged;
    struct sm_image_error e = { "" };
    struct sm_index ix;
    uint8_t *copy = malloc(size + 1);
    uint64_t data_bytes;

    if (!copy)
        return 0;
    if (!dir[0]) {
        set_up();
        atexit(tear_down);
    }
    memcpy(copy, data, size);
    if (size >= HEADER_BYTES)
        sm_put32(copy + H_SUM, sm_index_sum(copy, size));
    if (sm_index_parse(&ix, copy, size, true, &e) < 0)
        return 0;
    data_bytes = ix.data_bytes;
    write_file(layer_index, ix.file, size, size);
    sm_index_close(&ix);
    if (data_bytes > 1ull << 40)
        return 0;
    write_file(layer_data, NULL, 0, data_bytes);
    merge.limits.entries = 65536;
    if (sm_merge(&merge, &merged, &e) == 0) {
        free(merged.layer_bytes);
        if (unlink(meta) < 0)
            abort();
    } else if (!e.text[0] || access(meta, F_OK) == 0) {
        abort();
    }
    return 0;
}
