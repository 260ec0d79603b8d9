/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the way of a layer: bytes -> inflate -> tar -> data and index -> merge
 * over itself -> EROFS. Header checksums of a plain tar are put right first, or
 * hardly an input would get past them. A layer that was taken must merge.
 * Whatever happens, nothing may stay behind in the output folder.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "layer.h"
#include "merge.h"
#include "tar_fix.h"
#include "scratch.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sm_image_limits limits = { .bytes = 64 << 20, .entries = 4096 };
    struct sm_layer_config cfg = { .out = scratch_dir, .limits = limits };
    const char *layers[2] = { scratch_dir, scratch_dir };
    struct sm_merge_config merge = { .layers = layers, .n_layers = 2 };
    struct sm_merge_result merged;
    struct sm_layer_result result;
    struct sm_image_error e = { "" };
    uint8_t *copy = malloc(size + 1);

    if (!copy)
        return 0;
    if (!scratch_dir[0]) {
        scratch_begin();
        atexit(scratch_end);
    }
    memcpy(copy, data, size);
    tar_fix_checksums(copy, size);
    scratch_write("blob", copy, size);
    free(copy);
    cfg.blob = scratch_path("blob");
    merge.out = scratch_path("meta");
    if (sm_layer_ingest(&cfg, &result, &e) == 0) {
        if (sm_merge(&merge, &merged, &e) == 0) {
            free(merged.layer_bytes);
            if (unlink(merge.out) < 0)
                abort();
        } else if (!strstr(e.text, "has no target") && !strstr(e.text, "to a directory") &&
                   !strstr(e.text, "limit ") && !strstr(e.text, "symbolic link")) {
            fprintf(stderr, "merge of an ingested layer: %s\n", e.text);
            abort();
        }
        if (unlink(scratch_path("data")) < 0 || unlink(scratch_path("index")) < 0)
            abort();
    } else if (!e.text[0] || strchr(e.text, '\n')) {
        fprintf(stderr, "bad error text '%s'\n", e.text);
        abort();
    }
    /* Only the blob is left, whatever happened. */
    if (scratch_count() != 1)
        abort();
    return 0;
}
