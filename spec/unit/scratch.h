/* SPDX-License-Identifier: Apache-2.0 */
/* A folder of a test's own, removed with what is in it. */
#ifndef SM_SCRATCH_H
#define SM_SCRATCH_H

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char scratch_dir[64];

static inline void scratch_begin(void)
{
    /* In memory where there is such a place: these tests sync a lot. */
    snprintf(scratch_dir, sizeof(scratch_dir), "%s/sm-unit.XXXXXX",
             access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(scratch_dir))
        abort();
}

/* A path in it; up to eight are valid at a time. */
static inline const char *scratch_path(const char *name)
{
    static char ring[8][128];
    static unsigned at;
    char *p = ring[at++ % 8];

    snprintf(p, sizeof(ring[0]), "%s/%s", scratch_dir, name);
    return p;
}

static inline void scratch_write(const char *name, const void *data, size_t len)
{
    FILE *f = fopen(scratch_path(name), "wb");

    if (!f || fwrite(data, 1, len, f) != len || fclose(f))
        abort();
}

/* How many files are left. */
static inline unsigned scratch_count(void)
{
    DIR *dir = opendir(scratch_dir);
    struct dirent *e;
    unsigned n = 0;

    while (dir && (e = readdir(dir)))
        n += e->d_name[0] != '.';
    if (dir)
        closedir(dir);
    return n;
}

static inline void scratch_clear(void)
{
    DIR *dir = opendir(scratch_dir);
    struct dirent *e;

    while (dir && (e = readdir(dir)))
        if (e->d_name[0] != '.')
            unlink(scratch_path(e->d_name));
    if (dir)
        closedir(dir);
}

static inline void scratch_end(void)
{
    scratch_clear();
    rmdir(scratch_dir);
}

#endif
