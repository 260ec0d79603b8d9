/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio-blk; see virtio_blk.h. A request (5.2.6) is a readable header and
 * data, writable data, and a last writable byte for the status. How the driver
 * cuts these into buffers is its business (2.7.4), so the header and the
 * status byte are taken off the ends of the iovecs.
 *
 * A kick serves requests until the ring is empty, or a while, so that a reset
 * never waits long. The driver is told after each request that took its time,
 * and at the end.
 */
#include "dev/virtio_blk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dev/fault.h"
#include "event.h"
#include "state.h"
#include "trace.h"

#define ID_BLOCK 2
#define QUEUE_SIZE 256
#define SECTOR 512u
#define BATCH 64
#define NOTIFY_NS 100000u /* finished requests are not kept back longer */

enum {
    T_IN = 0,
    T_OUT = 1,
    T_FLUSH = 4,
    T_GET_ID = 8,
    T_DISCARD = 11,
    T_WRITE_ZEROES = 13
};
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };

#define F_SEG_MAX (1ull << 2)
#define F_RO (1ull << 5)
#define F_BLK_SIZE (1ull << 6)
#define F_FLUSH (1ull << 9)
#define F_TOPOLOGY (1ull << 10)
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)

#define RANGE_SEGS 64            /* discard or zero ranges of a request */
#define RANGE_SECTORS (1u << 22) /* 2 GiB */
#define CLUSTER_SECTORS (SM_DISK_CLUSTER_BYTES / SECTOR)

/* 5.2.4 */
struct config {
    uint64_t capacity;
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_block_exp, alignment_offset;
    uint16_t min_io_size;
    uint32_t opt_io_size;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_sector_alignment;
    uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
    uint8_t write_zeroes_may_unmap, unused1[3];
};
_Static_assert(sizeof(struct config) == 64, "5.2.4");
_Static_assert(sizeof(struct config) <= SM_VIRTIO_CONFIG_BYTES, "fits");

struct request_head {
    uint32_t type, reserved;
    uint64_t sector;
};

struct range {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct blk {
    struct sm_virtio virtio;
    struct sm_disk *disk;
    struct sm_faults *faults; /* may be NULL */
    char serial[SM_BLK_SERIAL_BYTES];
};

/* Requests are counted in sectors; an address near 2^64 must not wrap. */
static uint64_t byte_offset(uint64_t sector)
{
    return sector > UINT64_MAX / SECTOR ? UINT64_MAX : sector * SECTOR;
}

static uint8_t status_of(int err)
{
    return err == 0 ? S_OK : err == -ENOTSUP ? S_UNSUPP : S_IOERR;
}

/* DISCARD and WRITE_ZEROES: a list of ranges (5.2.6). */
static int zero_ranges(struct blk *blk, const struct iovec *iov, unsigned count,
                       uint64_t bytes, bool discard)
{
    struct range ranges[RANGE_SEGS];
    size_t n = bytes / sizeof(ranges[0]);

    if (bytes % sizeof(ranges[0]) || n > RANGE_SEGS || !n)
        return -EINVAL;
    sm_iov_read(iov, count, ranges, (size_t)bytes);
    for (size_t i = 0; i < n; i++) {
        const struct range *r = &ranges[i];
        bool unmap = r->flags & 1;
        int err;

        /* 5.2.6.2: unknown flags, and unmap in a discard, are refused. */
        if (r->flags & ~1u || (discard && unmap))
            return -ENOTSUP;
        if (r->sectors > RANGE_SECTORS)
            return -EINVAL;
        err = sm_disk_zero(blk->disk, byte_offset(r->sector),
                           (uint64_t)r->sectors * SECTOR, discard || unmap);
        if (err)
            return err;
    }
    return 0;
}

/* What the driver asked for; in ends before the status byte. *written gets
 * the bytes put into it. */
static int serve(struct blk *blk, const struct request_head *head, struct iovec *out,
                 unsigned out_count, uint64_t out_bytes, struct iovec *in,
                 unsigned in_count, uint64_t in_bytes, uint32_t *written)
{
    int err;

    *written = 0;
    switch (head->type) {
    case T_IN:
        if (in_bytes % SECTOR || in_bytes > UINT32_MAX - 1)
            return -EINVAL;
        err = sm_disk_read(blk->disk, byte_offset(head->sector), in, in_count);
        *written = err ? 0 : (uint32_t)in_bytes;
        return err;
    case T_OUT:
        if (out_bytes % SECTOR)
            return -EINVAL;
        return sm_disk_write(blk->disk, byte_offset(head->sector), out, out_count);
    case T_FLUSH:
        return sm_disk_flush(blk->disk);
    case T_GET_ID:
        *written = (uint32_t)sm_iov_write(in, in_count, blk->serial, sizeof(blk->serial));
        return 0;
    case T_DISCARD:
    case T_WRITE_ZEROES:
        if (sm_disk_read_only(blk->disk))
            return -EROFS;
        return zero_ranges(blk, out, out_count, out_bytes, head->type == T_DISCARD);
    default:
        return -ENOTSUP;
    }
}

/* What a request is to the rules of faults and to a trace. */
struct subject {
    enum sm_fault_op op; /* 0: none they know */
    const char *name;
    uint64_t sector, sectors;
};

static struct subject subject_of(const struct request_head *head, const struct iovec *out,
                                 unsigned out_count, uint64_t out_bytes, uint64_t in_bytes)
{
    struct subject s = { .name = "other", .sector = head->sector };
    struct range range = { 0 };

    switch (head->type) {
    case T_IN:
        s.op = SM_FAULT_READ;
        s.name = "read";
        s.sectors = in_bytes / SECTOR;
        break;
    case T_OUT:
        s.op = SM_FAULT_WRITE;
        s.name = "write";
        s.sectors = out_bytes / SECTOR;
        break;
    case T_FLUSH:
        s.op = SM_FAULT_FLUSH;
        s.name = "flush";
        break;
    case T_DISCARD:
    case T_WRITE_ZEROES: /* of a list, its first range stands for it */
        s.op = SM_FAULT_ZERO;
        s.name = head->type == T_DISCARD ? "discard" : "zero";
        sm_iov_read(out, out_count, &range, sizeof(range));
        s.sector = range.sector;
        s.sectors = range.sectors;
        break;
    }
    return s;
}

static void wait_ns(uint64_t ns)
{
    struct timespec ts = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };

    if (ns)
        nanosleep(&ts, NULL);
}

/* Leave the first bytes of the buffers only. */
static unsigned cut(struct iovec *iov, unsigned count, uint64_t bytes)
{
    for (unsigned i = 0; i < count; i++) {
        if (iov[i].iov_len >= bytes) {
            iov[i].iov_len = (size_t)bytes;
            return i + 1;
        }
        bytes -= iov[i].iov_len;
    }
    return count;
}

static void flip_in_buffers(const struct iovec *iov, unsigned count, uint64_t n)
{
    for (unsigned i = 0; i < count; i++) {
        if (n / 8 < iov[i].iov_len) {
            ((uint8_t *)iov[i].iov_base)[n / 8] ^= (uint8_t)(1u << n % 8);
            return;
        }
        n -= 8 * (uint64_t)iov[i].iov_len;
    }
}

static int flip_on_disk(struct sm_disk *disk, uint64_t sector, uint64_t n)
{
    uint8_t byte;
    struct iovec one = { &byte, 1 };
    int err = sm_disk_read(disk, byte_offset(sector) + n / 8, &one, 1);

    byte ^= (uint8_t)(1u << n % 8);
    return err ? err : sm_disk_write(disk, byte_offset(sector) + n / 8, &one, 1);
}

/* As serve, with the faults that the rules want. */
static int serve_faulty(struct blk *blk, const struct subject *s,
                        const struct sm_fault_verdict *fault, const struct request_head *head,
                        struct iovec *out, unsigned out_count, uint64_t out_bytes,
                        struct iovec *in, unsigned in_count, uint64_t in_bytes,
                        uint32_t *written)
{
    int err;

    *written = 0;
    wait_ns(fault->delay_ns);
    if (fault->fail)
        return -EIO;
    if (s->op == SM_FAULT_FLUSH && fault->silent)
        return 0;
    if (fault->tear) {
        out_count = cut(out, out_count, fault->tear_sectors * SECTOR);
        err = sm_disk_write(blk->disk, byte_offset(s->sector), out, out_count);
        return fault->silent ? err : -EIO;
    }
    err = serve(blk, head, out, out_count, out_bytes, in, in_count, in_bytes, written);
    if (err || !fault->corrupt)
        return err;
    if (s->op == SM_FAULT_READ)
        flip_in_buffers(in, in_count, fault->corrupt_bit);
    else
        err = flip_on_disk(blk->disk, s->sector, fault->corrupt_bit);
    return err;
}

static void trace(struct blk *blk, const struct subject *s, const struct sm_fault_verdict *fault,
                  uint64_t start_ns, int err)
{
    struct sm_trace_record r = {
        .kind = SM_TRACE_REQUEST,
        .time_ns = start_ns,
        .duration_ns = sm_trace_now_ns() - start_ns,
        .what = s->name,
        .address = s->sector,
        .size = s->sectors,
        .error = -err,
        .fault = fault->hit,
    };

    memcpy(r.device, blk->virtio.name, sizeof(r.device) - 1);
    sm_trace_put(blk->virtio.trace, &r);
}

/* One chain; returns its used length, or -1 for one that is no request. */
static int64_t serve_chain(struct blk *blk, struct sm_virtq_chain *chain)
{
    struct request_head head;
    struct iovec *out = chain->iov, *in = chain->iov + chain->out;
    unsigned out_count;
    uint8_t *status;
    struct sm_fault_verdict fault = { 0 };
    struct subject subject;
    uint32_t written;
    uint64_t start_ns;
    bool traced;
    int err;

    if (chain->out_bytes < sizeof(head) || !chain->in_bytes)
        return -1;
    sm_iov_read(out, chain->out, &head, sizeof(head));
    out_count = sm_iov_skip(&out, chain->out, sizeof(head));
    /* the status is the last writable byte */
    status = (uint8_t *)in[chain->in - 1].iov_base + --in[chain->in - 1].iov_len;

    subject = subject_of(&head, out, out_count, chain->out_bytes - sizeof(head),
                         chain->in_bytes - 1);
    if (blk->faults)
        sm_faults_judge(blk->faults, subject.op, subject.sector, subject.sectors, &fault);
    traced = sm_trace_on(blk->virtio.trace, SM_TRACE_REQUEST);
    start_ns = traced ? sm_trace_now_ns() : 0;
    err = serve_faulty(blk, &subject, &fault, &head, out, out_count,
                       chain->out_bytes - sizeof(head), in, chain->in, chain->in_bytes - 1,
                       &written);
    if (traced)
        trace(blk, &subject, &fault, start_ns, err);
    *status = status_of(err);
    return (int64_t)written + 1;
}

static void blk_kick(struct sm_virtio *v, unsigned queue)
{
    struct blk *blk = (struct blk *)v;
    struct iovec iov[SM_VIRTQ_SEGS];
    struct sm_virtq_chain chain = { .iov = iov, .cap = SM_VIRTQ_SEGS };
    uint64_t told_ns = sm_io_now_ns();
    unsigned served = 0;

    sm_virtio_kicks_off(v, queue);
    do {
        while (served < BATCH && sm_virtio_pop(v, queue, &chain)) {
            int64_t used = serve_chain(blk, &chain);

            if (used < 0) {
                sm_virtio_fail(v, queue, "not a block request");
                return;
            }
            sm_virtio_push(v, queue, chain.head, (uint32_t)used);
            served++;
            if (sm_io_now_ns() - told_ns > NOTIFY_NS) {
                sm_virtio_notify(v, queue);
                told_ns = sm_io_now_ns();
            }
        }
        if (served == BATCH) {
            sm_virtio_again(v, queue);
            break;
        }
    } while (sm_virtio_kicks_on(v, queue));
    sm_virtio_notify(v, queue);
}

static void blk_save(struct sm_virtio *v, struct sm_state_writer *w)
{
    int err = sm_disk_save(((struct blk *)v)->disk, w);

    if (err && !w->error)
        w->error = err;
}

static int blk_load(struct sm_virtio *v, struct sm_state_reader *r)
{
    return sm_disk_load(((struct blk *)v)->disk, r);
}

static void blk_free(struct blk *blk)
{
    sm_virtio_fini(&blk->virtio);
    free(blk);
}

static void blk_destroy(struct sm_virtio *v)
{
    struct blk *blk = (struct blk *)v;
    int err = sm_disk_close(blk->disk);

    if (err && v->events)
        sm_events_notice(v->events, "virtio-blk", "the disk could not be saved",
                         (uint64_t)-err);
    blk_free(blk);
}

static const struct sm_virtio_class blk_class = {
    .device = SM_VIRTIO_DEVICE_OPS("virtio-blk"),
    .id = ID_BLOCK,
    .queues = 1,
    .queue_size = QUEUE_SIZE,
    .kick = blk_kick,
    .save = blk_save,
    .load = blk_load,
    .destroy = blk_destroy,
};

static void fill_config(struct blk *blk)
{
    struct config cfg = {
        .capacity = sm_disk_size_bytes(blk->disk) / SECTOR,
        .seg_max = SM_VIRTQ_SEGS - 2, /* without header and status */
        .blk_size = SECTOR,
        .physical_block_exp = __builtin_ctz(CLUSTER_SECTORS),
        .min_io_size = CLUSTER_SECTORS,
        .max_discard_sectors = RANGE_SECTORS,
        .max_discard_seg = RANGE_SEGS,
        .discard_sector_alignment = CLUSTER_SECTORS,
        .max_write_zeroes_sectors = RANGE_SECTORS,
        .max_write_zeroes_seg = RANGE_SEGS,
        .write_zeroes_may_unmap = 1,
    };

    memcpy(blk->virtio.config, &cfg, sizeof(cfg));
    blk->virtio.config_bytes = sizeof(cfg);
}

int sm_virtio_blk_create(const struct sm_virtio_env *env, const struct sm_blk_config *cfg,
                         struct sm_virtio_mmio **out)
{
    uint64_t features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
    size_t serial = cfg->serial ? strlen(cfg->serial) : 0;
    struct blk *blk;
    int err;

    if (serial > SM_BLK_SERIAL_BYTES)
        return -EINVAL;
    blk = calloc(1, sizeof(*blk));
    if (!blk)
        return -ENOMEM;
    features |= sm_disk_read_only(cfg->disk) ? F_RO : F_DISCARD | F_WRITE_ZEROES;
    err = sm_virtio_init(&blk->virtio, env, &blk_class, features);
    if (err) {
        free(blk);
        return err;
    }
    blk->disk = cfg->disk;
    blk->faults = cfg->faults;
    blk->virtio.traces_itself = true;
    if (serial)
        memcpy(blk->serial, cfg->serial, serial);
    fill_config(blk);
    err = sm_virtio_mmio_create(&blk->virtio, out);
    if (err)
        blk_free(blk);
    return err;
}
