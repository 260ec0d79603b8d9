/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the way of a layer: bytes -> inflate -> tar -> data and index -> merge
 * over itself -> EROFS. Header checksums of a plain tar are put right first, or
 * hardly an input would get past them. A layer that was taken must merge.
 * Whatever happens, nothing may stay behind in the output folder.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layer.h"
#include "merge.h"
#include "tar_fix.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[64], blob[96], layer_data[96], layer_index[96], meta[96];

static void set_up(void)
{
    const char *base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";

    snprintf(dir, sizeof(dir), "%s/sm-layer-fuzz-XXXXXX", base);
    if (!mkdtemp(dir))
        abort();
    snprintf(blob, sizeof(blob), "%s/blob", dir);
    snprintf(layer_data, sizeof(layer_data), "%s/data", dir);
    snprintf(layer_index, sizeof(layer_index), "%s/index", dir);
    snprintf(meta, sizeof(meta), "%s/meta", dir);
}

static void tear_down(void)
{
    unlink(blob);
    rmdir(dir);
}

static void write_blob(const uint8_t *data, size_t size)
{
    int fd = open(blob, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    if (fd < 0 || sm_image_write_all(fd, data, size, 0) < 0)
        abort();
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sm_image_limits limits = { .bytes = 64 << 20, .entries = 4096 };
    struct sm_layer_config cfg = { .blob = blob, .out = dir, .limits = limits };
    const char *layers[2] = { dir, dir };
    struct sm_merge_config merge = { .layers = layers, .n_layers = 2, .out = meta };
    struct sm_merge_result merged;
    struct sm_layer_result result;
    struct sm_image_error e = { "" };
    uint8_t *copy = malloc(size + 1);

    if (!copy)
        return 0;
    if (!dir[0]) {
        set_up();
        atexit(tear_down);
    }
    memcpy(copy, data, size);
    tar_fix_checksums(copy, size);
    write_blob(copy, size);
    free(copy);
    if (sm_layer_ingest(&cfg, &result, &e) == 0) {
        if (sm_merge(&merge, &merged, &e) == 0) {
            free(merged.layer_bytes);
            if (unlink(meta) < 0)
                abort();
        } else if (!strstr(e.text, "has no target") && !strstr(e.text, "to a directory") &&
                   !strstr(e.text, "limit ") && !strstr(e.text, "symbolic link")) {
            fprintf(stderr, "merge of an ingested layer: %s\n", e.text);
            abort();
        }
        if (unlink(layer_data) < 0 || unlink(layer_index) < 0)
            abort();
    } else if (!e.text[0] || strchr(e.text, '\n')) {
        fprintf(stderr, "bad error text '%s'\n", e.text);
        abort();
    }
    /* Only the blob is left, whatever happened. */
    if (access(layer_data, F_OK) == 0 || access(layer_index, F_OK) == 0 ||
        access(meta, F_OK) == 0)
        abort();
    return 0;
}
