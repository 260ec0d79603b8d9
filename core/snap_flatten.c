/* SPDX-License-Identifier: Apache-2.0 */
/* One snapshot out of a chain; see snap.h. */
#include "snap_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crc32c.h"

#define BATCH 256 /* pages */

struct flattener {
    struct sm_snap *const *links;
    unsigned count;
    int fd;
    uint8_t *buf; /* BATCH pages */
    struct sm_snap_progress *progress;
    struct sm_snap_area areas[SM_SNAP_AREAS];
};

static struct sm_snap *last(const struct flattener *f)
{
    return f->links[f->count - 1];
}

/* Write what is not zero of a batch, and sum it. */
static int put(struct flattener *f, struct sm_snap_area *out, uint64_t page, unsigned n)
{
    unsigned run = 0;

    for (unsigned k = 0; k <= n; k++) {
        const uint8_t *p = f->buf + (size_t)k * SM_SNAP_UNIT_BYTES;

        if (k < n && !sm_snap_is_zero(p)) {
            out->sum = sm_sum_add(out->sum, page + k, p, SM_SNAP_UNIT_BYTES);
            run++;
        } else if (run) {
            int err = sm_file_write(f->fd, p - (size_t)run * SM_SNAP_UNIT_BYTES,
                                    (size_t)run * SM_SNAP_UNIT_BYTES,
                                    out->offset + (page + k - run) * SM_SNAP_UNIT_BYTES);

            if (err)
                return err;
            run = 0;
        }
    }
    return 0;
}

static int flatten_ram(struct flattener *f, unsigned i)
{
    uint64_t pages = f->areas[i].len_bytes / SM_SNAP_UNIT_BYTES;
    int err = 0;

    f->areas[i].sum = 0;
    for (uint64_t at = 0; !err && at < pages; at += BATCH) {
        unsigned n = pages - at < BATCH ? (unsigned)(pages - at) : BATCH;

        err = sm_snap_gather(f->links, f->count, i, at, n, f->buf);
        if (!err)
            err = put(f, &f->areas[i], at, n);
        sm_snap_did(f->progress, (uint64_t)n * SM_SNAP_UNIT_BYTES);
    }
    return err;
}

/* A disk: its clusters where they were, which the state refers to. */
static int copy_blob(struct flattener *f, const struct sm_snap_area *a)
{
    uint64_t at = a->offset, end = a->offset + a->len_bytes;
    int err = 0;

    while (!err && (at = sm_snap_next_data(last(f)->fd, at, end)) < end) {
        size_t room = (size_t)BATCH * SM_SNAP_UNIT_BYTES;
        size_t len = end - at < room ? (size_t)(end - at) : room;

        err = sm_file_read(last(f)->fd, f->buf, len, at);
        if (!err)
            err = sm_file_write(f->fd, f->buf, len, at);
        at += len;
    }
    sm_snap_did(f->progress, a->len_bytes);
    return err;
}

static int put_section(struct flattener *f, struct sm_snap_section *s, const void *p, uint64_t *end)
{
    s->offset = *end;
    s->crc = sm_crc32c(0, p, (size_t)s->len_bytes);
    *end += s->len_bytes;
    return sm_file_write(f->fd, p, (size_t)s->len_bytes, s->offset);
}

/* Everything but the pages is the last one's, at the same places. */
static int put_rest(struct flattener *f)
{
    const struct sm_snap *leaf = last(f);
    struct sm_snap_header h = leaf->header;
    uint64_t end = h.state.offset;
    int err = put_section(f, &h.state, leaf->state, &end);

    if (!err)
        err = put_section(f, &h.meta, leaf->meta, &end);
    if (!err)
        err = put_section(f, &h.index, f->areas, &end);
    h.version = 1;
    h.file_bytes = end;
    memset(h.parent, 0, sizeof(h.parent));
    memset(&h.pages, 0, sizeof(h.pages));
    h.crc = sm_crc32c(0, &h, offsetof(struct sm_snap_header, crc));
    return err ? err : sm_file_write(f->fd, &h, sizeof(h), 0);
}

static int flatten(struct flattener *f)
{
    const struct sm_snap *leaf = last(f);
    int err = 0;

    memcpy(f->areas, leaf->areas, sizeof(f->areas));
    for (unsigned i = 0; !err && i < leaf->area_count; i++)
        err = leaf->areas[i].kind == SM_SNAP_RAM ? flatten_ram(f, i)
                                                 : copy_blob(f, &leaf->areas[i]);
    return err ? err : put_rest(f);
}

int sm_snap_flatten(struct sm_snap *const *links, unsigned count, int fd,
                    struct sm_snap_progress *progress, char *err, size_t errlen)
{
    struct flattener f = { .links = links, .count = count, .fd = fd, .progress = progress };
    int e = sm_snap_check_chain(links[count - 1], links, count - 1, err, errlen);

    if (progress) /* every file is read, and the last one's areas are written */
        progress->total_bytes = sm_snap_area_bytes(links[count - 1]);
    for (unsigned i = 0; progress && i < count; i++)
        progress->total_bytes += sm_snap_area_bytes(links[i]);
    for (unsigned i = 0; !e && i < count; i++)
        e = sm_snap_verify(links[i], progress, err, errlen);
    if (e)
        return e;
    f.buf = malloc((size_t)BATCH * SM_SNAP_UNIT_BYTES);
    e = f.buf ? flatten(&f) : -ENOMEM;
    if (!e && fsync(fd) < 0)
        e = -errno;
    free(f.buf);
    return e ? sm_snap_say(err, errlen, e, "%s", strerror(-e)) : 0;
}
