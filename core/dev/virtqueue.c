/* SPDX-License-Identifier: Apache-2.0 */
/* The split virtqueue; virtqueue.h has the picture and the rules. */
#include "dev/virtqueue.h"

#include <errno.h>
#include <string.h>

#include "backend.h"
#include "mem.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are little-endian");
_Static_assert(sizeof(struct sm_virtq_desc) == 16, "2.7.5");

struct used_elem {
    uint32_t id, len;
};

/* Field addresses. avail: flags, idx, ring[size], used_event (2.7.6);
 * used: flags, idx, ring[size], avail_event (2.7.8). */
static uint16_t *avail_flags(const struct sm_virtq *vq)
{
    return (uint16_t *)vq->avail;
}

static uint16_t *avail_idx(const struct sm_virtq *vq)
{
    return (uint16_t *)(vq->avail + 2);
}

static uint16_t *avail_entry(const struct sm_virtq *vq, uint16_t i)
{
    return (uint16_t *)(vq->avail + 4) + i % vq->size;
}

static uint16_t *used_event(const struct sm_virtq *vq)
{
    return (uint16_t *)(vq->avail + 4) + vq->size;
}

static uint16_t *used_flags(const struct sm_virtq *vq)
{
    return (uint16_t *)vq->used;
}

static uint16_t *used_idx(const struct sm_virtq *vq)
{
    return (uint16_t *)(vq->used + 2);
}

static uint16_t *avail_event(const struct sm_virtq *vq)
{
    return (uint16_t *)(vq->used + 4 + sizeof(struct used_elem) * vq->size);
}

/* Guest RAM the device may store to. A read-only region (a ROM, a read-only
 * DAX window) may be mapped read-only here too: a store would be a SIGSEGV. */
static void *writable_ptr(const struct sm_mem *mem, uint64_t gpa, uint64_t len)
{
    void *p = sm_mem_ptr(mem, gpa, len);

    for (unsigned i = 0; p && i < mem->count; i++) {
        const struct sm_mem_region *r = &mem->regions[i];
        if (gpa >= r->gpa && gpa - r->gpa < r->len_bytes)
            return r->prot & SM_PROT_WRITE ? p : NULL;
    }
    return NULL;
}

int sm_virtq_setup(struct sm_virtq *vq, const struct sm_mem *mem, uint16_t size,
                   uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa,
                   bool event_idx, bool indirect)
{
    sm_virtq_clear(vq);
    if (!size || size > SM_VIRTQ_SIZE || (size & (size - 1)))
        return -EINVAL;
    if (desc_gpa % 16 || avail_gpa % 2 || used_gpa % 4)
        return -EINVAL;

    const void *desc = sm_mem_ptr(mem, desc_gpa, sizeof(struct sm_virtq_desc) * size);
    void *avail = sm_mem_ptr(mem, avail_gpa, 6 + 2ull * size);
    void *used = writable_ptr(mem, used_gpa, 6 + sizeof(struct used_elem) * size);
    if (!desc || !avail || !used)
        return -EFAULT;
    /* A region's hva is page aligned, so gpa alignment carries over, unless a
     * foreign region is not: then the typed accesses would be undefined. */
    if ((uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return -EFAULT;

    vq->mem = mem;
    vq->size = size;
    vq->event_idx = event_idx;
    vq->indirect = indirect;
    vq->desc_gpa = desc_gpa;
    vq->avail_gpa = avail_gpa;
    vq->used_gpa = used_gpa;
    vq->desc = desc;
    vq->avail = avail;
    vq->used = used;
    return 0;
}

void sm_virtq_clear(struct sm_virtq *vq)
{
    memset(vq, 0, sizeof(*vq));
}

static int broken(struct sm_virtq *vq, const char *why)
{
    vq->fault = why;
    return -EBADMSG;
}

/* One descriptor's buffer, appended to the chain. */
static int add_buffer(struct sm_virtq *vq, struct sm_virtq_chain *chain,
                      const struct sm_virtq_desc *d)
{
    bool write = d->flags & SM_VIRTQ_DESC_WRITE;

    if (!write && chain->in)
        return broken(vq, "readable buffer after a writable one"); /* 2.7.4.2 */
    if (!d->len)
        return 0;
    if (chain->out + chain->in == chain->cap)
        return -ENOBUFS;
    /* An iovec is not const; nobody writes to a readable buffer. */
    void *p = write ? writable_ptr(vq->mem, d->addr, d->len)
                    : (void *)sm_mem_source(vq->mem, d->addr, d->len);
    if (!p)
        return broken(vq, "buffer outside of memory");

    struct iovec *v = &chain->iov[chain->out + chain->in];
    v->iov_base = p;
    v->iov_len = d->len;
    if (write) {
        chain->in++;
        chain->in_bytes += d->len;
    } else {
        chain->out++;
        chain->out_bytes += d->len;
    }
    return 0;
}

/* Switch to an indirect table (2.7.5.3): whole in RAM, not nested, not long. */
static int enter_indirect(struct sm_virtq *vq, const struct sm_virtq_desc *d,
                          const uint8_t **table, uint32_t *entries)
{
    if (!vq->indirect)
        return broken(vq, "indirect descriptor without the feature");
    if (d->flags & SM_VIRTQ_DESC_NEXT)
        return broken(vq, "indirect descriptor with a next one");
    if (!d->len || d->len % sizeof(*d) || d->len / sizeof(*d) > SM_VIRTQ_SEGS)
        return broken(vq, "indirect table of a bad length");
    const uint8_t *p = sm_mem_ptr(vq->mem, d->addr, d->len);
    if (!p)
        return broken(vq, "indirect table outside of memory");
    *table = p;
    *entries = d->len / sizeof(*d);
    return 0;
}

static int walk(struct sm_virtq *vq, struct sm_virtq_chain *chain, uint16_t head)
{
    const uint8_t *table = vq->desc;
    uint32_t entries = vq->size, left = entries, i = head;
    bool indirect = false;

    chain->head = head;
    chain->out = chain->in = 0;
    chain->out_bytes = chain->in_bytes = 0;
    for (;;) {
        struct sm_virtq_desc d;
        int r;

        if (i >= entries)
            return broken(vq, "descriptor index out of range");
        if (!left--)
            return broken(vq, "descriptor loop");
        memcpy(&d, table + i * sizeof(d), sizeof(d));
        /* The compiler must not read the guest's copy again later. */
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        if (d.flags & SM_VIRTQ_DESC_INDIRECT) {
            /* A flag: the table may be, by its address, the ring's own. */
            if (indirect)
                return broken(vq, "nested indirect descriptor");
            indirect = true;
            r = enter_indirect(vq, &d, &table, &entries);
            if (r)
                return r;
            left = entries;
            i = 0;
            continue;
        }
        r = add_buffer(vq, chain, &d);
        if (r)
            return r;
        if (!(d.flags & SM_VIRTQ_DESC_NEXT))
            return 1;
        i = d.next;
    }
}

int sm_virtq_pop(struct sm_virtq *vq, struct sm_virtq_chain *chain)
{
    if (vq->fault)
        return -EBADMSG;
    if (!vq->size)
        return 0;

    /* ACQUIRE: partner of the driver's barrier between filling descriptors
     * and ring and moving idx (2.7.13.2). Without it stale ones are read. */
    uint16_t idx = __atomic_load_n(avail_idx(vq), __ATOMIC_ACQUIRE);
    uint16_t ready = idx - vq->next_avail;
    if (!ready)
        return 0;
    if (ready + sm_virtq_taken(vq) > vq->size)
        return broken(vq, "available index runs ahead");

    uint16_t head = __atomic_load_n(avail_entry(vq, vq->next_avail), __ATOMIC_RELAXED);
    int r = walk(vq, chain, head);
    if (r == 1)
        vq->next_avail++;
    return r;
}

void sm_virtq_unpop(struct sm_virtq *vq, unsigned n)
{
    vq->next_avail -= n;
}

void sm_virtq_fill(struct sm_virtq *vq, uint16_t head, uint32_t written)
{
    if (!vq->size)
        return;
    struct used_elem e = { head, written };
    memcpy(vq->used + 4 + sizeof(e) * (vq->next_used % vq->size), &e, sizeof(e));
    vq->next_used++;
}

void sm_virtq_publish(struct sm_virtq *vq)
{
    /* RELEASE: partner of the driver's read barrier after it sees idx move.
     * Without it the driver could read an old element. */
    if (vq->size)
        __atomic_store_n(used_idx(vq), vq->next_used, __ATOMIC_RELEASE);
}

void sm_virtq_push(struct sm_virtq *vq, uint16_t head, uint32_t written)
{
    sm_virtq_fill(vq, head, written);
    sm_virtq_publish(vq);
}

bool sm_virtq_should_notify(struct sm_virtq *vq)
{
    if (!vq->size || vq->signalled == vq->next_used)
        return false;
    uint16_t old = vq->signalled, now = vq->next_used;
    vq->signalled = now;

    /* SEQ_CST pair: idx must be visible before the driver's wish is read;
     * partner: the driver's full barrier between setting used_event (or
     * flags) and re-reading idx. Without it both sleep. */
    __atomic_store_n(used_idx(vq), now, __ATOMIC_SEQ_CST);
    if (!vq->event_idx)
        return !(__atomic_load_n(avail_flags(vq), __ATOMIC_SEQ_CST) &
                 SM_VIRTQ_AVAIL_NO_INTERRUPT);
    uint16_t event = __atomic_load_n(used_event(vq), __ATOMIC_SEQ_CST);
    /* 2.7.7.2: was the entry at used_event among those just pushed? */
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

void sm_virtq_kicks_off(struct sm_virtq *vq)
{
    /* With EVENT_IDX an avail_event left behind does the same (2.7.10). */
    if (vq->size && !vq->event_idx)
        __atomic_store_n(used_flags(vq), SM_VIRTQ_USED_NO_NOTIFY, __ATOMIC_RELAXED);
}

uint16_t sm_virtq_seen(const struct sm_virtq *vq)
{
    return vq->size ? __atomic_load_n(avail_idx(vq), __ATOMIC_ACQUIRE) : 0;
}

bool sm_virtq_kicks_on_after(struct sm_virtq *vq, uint16_t seen)
{
    if (!vq->size || vq->fault)
        return false;
    /* SEQ_CST pair: our wish must be visible before idx is read again;
     * partner: the driver's full barrier between moving idx and reading
     * avail_event (or flags). Without it a buffer waits for ever. */
    if (vq->event_idx)
        __atomic_store_n(avail_event(vq), seen, __ATOMIC_SEQ_CST);
    else
        __atomic_store_n(used_flags(vq), 0, __ATOMIC_SEQ_CST);
    return __atomic_load_n(avail_idx(vq), __ATOMIC_SEQ_CST) != seen;
}

bool sm_virtq_kicks_on(struct sm_virtq *vq)
{
    return sm_virtq_kicks_on_after(vq, vq->next_avail);
}

size_t sm_iov_read(const struct iovec *iov, unsigned n, void *buf, size_t len)
{
    size_t done = 0;

    for (unsigned i = 0; i < n && done < len; i++) {
        size_t part = iov[i].iov_len < len - done ? iov[i].iov_len : len - done;
        memcpy((uint8_t *)buf + done, iov[i].iov_base, part);
        done += part;
    }
    return done;
}

size_t sm_iov_write(const struct iovec *iov, unsigned n, const void *buf, size_t len)
{
    size_t done = 0;

    for (unsigned i = 0; i < n && done < len; i++) {
        size_t part = iov[i].iov_len < len - done ? iov[i].iov_len : len - done;
        memcpy(iov[i].iov_base, (const uint8_t *)buf + done, part);
        done += part;
    }
    return done;
}

unsigned sm_iov_skip(struct iovec **iov, unsigned n, size_t bytes)
{
    while (n && bytes >= (*iov)->iov_len) {
        bytes -= (*iov)->iov_len;
        (*iov)++;
        n--;
    }
    if (n) {
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
        (*iov)->iov_len -= bytes;
    }
    return n;
}
