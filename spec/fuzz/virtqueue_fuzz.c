/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A driver that writes anything into its rings. The input is the guest's whole
 * memory, after a few bytes that place the rings in it and say what the device
 * does. What must hold whatever is there: every buffer given lies in that
 * memory and has the length it claims, no chain outgrows its array, what is
 * out never exceeds the ring, and each round ends.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "dev/virtqueue.h"
#include "mem.h"

#define GPA 0x10000ull
#define BYTES (64u << 10)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct sm_mem mem;
static uint8_t *ram;

static void require(int ok)
{
    if (!ok)
        abort();
}

static void check_chain(const struct sm_virtq_chain *c)
{
    uint64_t bytes[2] = { 0, 0 };

    require(c->out + c->in <= c->cap); /* none: all its buffers were empty */
    for (unsigned i = 0; i < c->out + c->in; i++) {
        uint8_t *p = c->iov[i].iov_base;
        size_t len = c->iov[i].iov_len;

        require(p >= ram && len <= BYTES && p + len <= ram + BYTES);
        bytes[i >= c->out] += len;
        if (i < c->out)
            for (size_t j = 0; j < len; j += 512)
                require(*(volatile uint8_t *)(p + j) <= 255);
    }
    require(bytes[0] == c->out_bytes && bytes[1] == c->in_bytes);
}

/* The device's verbs, as the input says. */
static void serve(struct sm_virtq *vq, const uint8_t *script, size_t n)
{
    struct iovec iov[SM_VIRTQ_SEGS];
    uint16_t out[SM_VIRTQ_SIZE];
    unsigned held = 0;

    for (size_t i = 0; i < n; i++) {
        struct sm_virtq_chain c = { .iov = iov, .cap = script[i] & 8 ? 4 : SM_VIRTQ_SEGS };

        switch (script[i] & 7) {
        case 0: case 1: case 2: {
            int r = sm_virtq_pop(vq, &c);

            require(r == 1 || r == 0 || r == -EBADMSG || r == -ENOBUFS);
            require((r == -EBADMSG) == (vq->fault != NULL));
            if (r != 1)
                break;
            check_chain(&c);
            require(held < vq->size && c.head < vq->size);
            out[held++] = c.head;
            break;
        }
        case 3: case 4:
            if (held) {
                sm_virtq_push(vq, out[0], script[i]);
                memmove(out, out + 1, --held * sizeof(out[0]));
            }
            break;
        case 5:
            if (held && !vq->fault) {
                sm_virtq_unpop(vq, 1);
                held--;
            }
            break;
        case 6:
            sm_virtq_should_notify(vq);
            sm_virtq_kicks_off(vq);
            break;
        default:
            sm_virtq_kicks_on(vq);
            sm_virtq_kicks_on_after(vq, sm_virtq_seen(vq));
        }
        require(sm_virtq_taken(vq) <= vq->size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sm_mem_desc desc = { .gpa = GPA, .len_bytes = BYTES, .kind = SM_MEM_ANON };
    struct sm_virtq vq = { 0 };
    uint16_t place[4];
    size_t script;

    if (size < 16)
        return 0;
    if (!ram) {
        sm_mem_init(&mem, NULL);
        require(sm_mem_map(&mem, &desc) == 0);
        ram = sm_mem_ptr(&mem, GPA, BYTES);
    }
    memcpy(place, data, sizeof(place));
    script = data[8];
    data += 9, size -= 9;
    script = script < size ? script : size;
    memset(ram, 0, BYTES);
    memcpy(ram, data + script, size - script < BYTES ? size - script : BYTES);
    if (sm_virtq_setup(&vq, &mem, (uint16_t)(1u << (place[0] & 15)), GPA + place[1] * 2ull,
                       GPA + place[2], GPA + place[3], place[0] & 16, place[0] & 32) == 0)
        serve(&vq, data, script);
    return 0;
}
