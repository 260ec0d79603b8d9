/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the archives of whole images: bytes -> inflate -> tar -> files under our
 * names. What was told of an entry must be true of its file (size and digest), the
 * names in the tar must name nothing, and on an error the result is empty and the
 * folder can be emptied: it holds regular files of ours alone.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "archive.h"
#include "image.h"
#include "tar_fix.h"
#include "scratch.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char out[96], input[96];

static void set_up(void)
{
    scratch_begin();
    snprintf(out, sizeof(out), "%s", scratch_path("out"));
    snprintf(input, sizeof(input), "%s", scratch_path("input"));
    if (mkdir(out, 0700) < 0)
        abort();
}

static void tear_down(void)
{
    rmdir(out);
    scratch_end();
}

/* The file of an entry is what the entry says. */
static void check_entry(const struct sm_archive_entry *entry)
{
    char path[128], text[SM_DIGEST_TEXT];
    struct sm_image_error e = { "" };
    struct stat st;

    if (!entry->name || !entry->name[0])
        abort();
    snprintf(path, sizeof(path), "%s/%u", out, entry->file);
    if (entry->link) {
        if (access(path, F_OK) == 0)
            abort();
        return;
    }
    if (lstat(path, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != entry->bytes)
        abort();
    if (sm_digest_file(path, SM_DIGEST_SHA256, text, NULL, &e) < 0 || strcmp(text, entry->digest))
        abort();
}

/* Empties the folder; in it are plain files named 0, 1, 2 … and nothing else. */
static uint32_t empty_folder(void)
{
    DIR *d = opendir(out);
    struct dirent *de;
    uint32_t files = 0;

    if (!d)
        abort();
    while ((de = readdir(d))) {
        char path[sizeof(out) + sizeof(de->d_name) + 1];

        if (de->d_name[0] == '.' && (!de->d_name[1] || !strcmp(de->d_name, "..")))
            continue;
        if (strspn(de->d_name, "0123456789") != strlen(de->d_name))
            abort();
        snprintf(path, sizeof(path), "%s/%s", out, de->d_name);
        if (unlink(path) < 0)
            abort();
        files++;
    }
    closedir(d);
    return files;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sm_archive_config cfg = { .path = input, .out = out, .limits = { .bytes = 16 << 20 } };
    struct sm_archive_result r;
    struct sm_image_error e = { "" };
    uint32_t regular = 0, files;
    uint8_t *copy = malloc(size + 1);
    int ret;

    if (!copy)
        return 0;
    if (!out[0]) {
        set_up();
        atexit(tear_down);
    }
    memcpy(copy, data, size);
    tar_fix_checksums(copy, size);
    scratch_write("input", copy, size);
    free(copy);
    ret = sm_archive_unpack(&cfg, &r, &e);
    if (ret < 0 && (r.count || r.entries || !e.text[0] || strchr(e.text, '\n'))) {
        fprintf(stderr, "a failed unpack left a result, or its error is '%s'\n", e.text);
        abort();
    }
    for (uint32_t i = 0; i < r.count; i++) {
        check_entry(&r.entries[i]);
        regular += !r.entries[i].link;
    }
    files = empty_folder();
    if (ret == 0 && files != regular)
        abort();
    sm_archive_result_free(&r);
    return 0;
}
