/* SPDX-License-Identifier: Apache-2.0 */
/* Holes, bits and pages: what all of core/snap*.c needs. */
#include "snap_impl.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

bool sm_snap_is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, SM_SNAP_UNIT_BYTES - 1) == 0;
}

uint64_t sm_snap_next_data(int fd, uint64_t at, uint64_t end)
{
    off_t found = lseek(fd, (off_t)at, SEEK_DATA);

    if (found < 0)
        return errno == ENXIO ? end : at;
    if ((uint64_t)found >= end)
        return end;
    return (uint64_t)found - (uint64_t)found % SM_SNAP_UNIT_BYTES;
}

uint64_t sm_snap_run(const uint8_t *bits, uint64_t *from, uint64_t end, uint64_t max)
{
    uint64_t at = *from, n = 0;

    while (at < end && !sm_snap_bit(bits, at))
        at += at % 8 == 0 && bits[at / 8] == 0 ? 8 : 1;
    *from = at;
    while (at + n < end && n < max && sm_snap_bit(bits, at + n))
        n++;
    return n;
}

int sm_snap_gather(struct sm_snap *const *links, unsigned count, unsigned area, uint64_t page,
                   unsigned n, uint8_t *buf)
{
    for (unsigned l = 0; l < count; l++) {
        const struct sm_snap *link = links[l];
        const struct sm_snap_area *a = &link->areas[area];
        uint64_t at = page, len = n, end = page + n;

        for (; at < end; at += len) {
            int err;

            len = l ? sm_snap_run(link->area_pages[area], &at, end, end) : n;
            if (!len)
                break;
            err = sm_file_read(link->fd, buf + (at - page) * SM_SNAP_UNIT_BYTES,
                               (size_t)(len * SM_SNAP_UNIT_BYTES),
                               a->offset + at * SM_SNAP_UNIT_BYTES);
            if (err)
                return err;
        }
    }
    return 0;
}

#define TELL_BYTES (16u << 20)

void sm_snap_did(struct sm_snap_progress *p, uint64_t bytes)
{
    if (!p)
        return;
    p->done_bytes += bytes;
    if (p->done_bytes - p->told_bytes >= TELL_BYTES || p->done_bytes == p->total_bytes) {
        p->told_bytes = p->done_bytes;
        p->tell(p);
    }
}

uint64_t sm_snap_area_bytes(const struct sm_snap *snap)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < snap->area_count; i++)
        bytes += snap->areas[i].len_bytes;
    return bytes;
}
