/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the reader of layer indexes and, with what it accepts, the merge and
 * the EROFS writer. The checksum is put right, so that everything behind it is
 * reached. A forged index may be refused; it may not crash anything.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index_format.h"
#include "merge.h"
#include "scratch.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *layers[2] = { scratch_dir, scratch_dir };
    struct sm_merge_config merge = { .layers = layers, .n_layers = 2 };
    struct sm_merge_result merged;
    struct sm_image_error e = { "" };
    struct sm_index ix;
    uint8_t *copy = malloc(size + 1);
    uint64_t data_bytes;

    if (!copy)
        return 0;
    if (!scratch_dir[0]) {
        scratch_begin();
        atexit(scratch_end);
    }
    memcpy(copy, data, size);
    if (size >= HEADER_BYTES)
        sm_put32(copy + H_SUM, sm_index_sum(copy, size));
    if (sm_index_parse(&ix, copy, size, true, &e) < 0)
        return 0;
    data_bytes = ix.data_bytes;
    scratch_write("index", ix.file, size);
    sm_index_close(&ix);
    if (data_bytes > 1ull << 40)
        return 0;
    scratch_write("data", NULL, 0);
    if (truncate(scratch_path("data"), (off_t)data_bytes) < 0)
        abort();
    merge.out = scratch_path("meta");
    merge.limits.entries = 65536;
    if (sm_merge(&merge, &merged, &e) == 0) {
        free(merged.layer_bytes);
        if (unlink(merge.out) < 0)
            abort();
    } else if (!e.text[0] || access(merge.out, F_OK) == 0) {
        abort();
    }
    return 0;
}
