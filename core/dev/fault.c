/* SPDX-License-Identifier: Apache-2.0 */
/* Faults on demand; see fault.h. */
#include "dev/fault.h"

#include <errno.h>
#include <string.h>

void sm_faults_init(struct sm_faults *f)
{
    memset(f, 0, sizeof(*f));
    pthread_mutex_init(&f->lock, NULL);
}

void sm_faults_destroy(struct sm_faults *f)
{
    pthread_mutex_destroy(&f->lock);
}

int sm_faults_add(struct sm_faults *f, const struct sm_fault_rule *rule, unsigned *id)
{
    int err = -ENOSPC;

    pthread_mutex_lock(&f->lock);
    for (unsigned i = 0; i < SM_FAULT_RULES && err; i++) {
        if (!f->rules[i].used) {
            f->rules[i] = *rule;
            f->rules[i].used = true;
            *id = i;
            err = 0;
        }
    }
    pthread_mutex_unlock(&f->lock);
    return err;
}

int sm_faults_remove(struct sm_faults *f, unsigned id)
{
    int err = -ENOENT;

    pthread_mutex_lock(&f->lock);
    if (id < SM_FAULT_RULES && f->rules[id].used) {
        f->rules[id].used = false;
        err = 0;
    }
    pthread_mutex_unlock(&f->lock);
    return err;
}

bool sm_faults_get(struct sm_faults *f, unsigned id, struct sm_fault_rule *out)
{
    bool used;

    pthread_mutex_lock(&f->lock);
    used = id < SM_FAULT_RULES && f->rules[id].used;
    if (used)
        *out = f->rules[id];
    pthread_mutex_unlock(&f->lock);
    return used;
}

/* splitmix64 (Steele, Lea, Flood 2014): any seed will do, zero included. */
static uint64_t draw(struct sm_fault_rule *r)
{
    uint64_t z = r->random += 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static bool matches(const struct sm_fault_rule *r, enum sm_fault_op op, uint64_t sector,
                    uint64_t sectors)
{
    if (!r->used || !(r->ops & op))
        return false;
    if (op == SM_FAULT_FLUSH)
        return true;
    return sector <= r->last && sectors && sector + (sectors - 1) >= r->first;
}

/* Every match draws, hit or not, so that one rule's end does not shift another. */
static bool strikes(struct sm_fault_rule *r)
{
    bool lucky = (double)(draw(r) >> 11) * 0x1p-53 < r->probability;

    r->matched++;
    if (r->skip) {
        r->skip--;
        return false;
    }
    if (!lucky || (r->ends && !r->count))
        return false;
    if (r->ends)
        r->count--;
    r->hits++;
    return true;
}

static void act(struct sm_fault_rule *r, enum sm_fault_op op, uint64_t sectors,
                struct sm_fault_verdict *out)
{
    out->hit = true;
    switch (r->action) {
    case SM_FAULT_FAIL:
        out->fail = true;
        break;
    case SM_FAULT_DELAY:
        out->delay_ns += r->delay_ns;
        break;
    case SM_FAULT_TEAR:
        if (op == SM_FAULT_WRITE && sectors) {
            out->tear = true;
            out->silent = r->silent;
            out->tear_sectors = draw(r) % sectors;
        } else if (r->silent) {
            out->silent = true; /* a flush that does nothing */
        } else {
            out->fail = true;
        }
        break;
    case SM_FAULT_CORRUPT:
        if (sectors && (op == SM_FAULT_READ || op == SM_FAULT_WRITE)) {
            out->corrupt = true;
            out->corrupt_bit = draw(r) % (sectors * 512 * 8);
        }
        break;
    }
}

void sm_faults_judge(struct sm_faults *f, enum sm_fault_op op, uint64_t sector,
                     uint64_t sectors, struct sm_fault_verdict *out)
{
    memset(out, 0, sizeof(*out));
    pthread_mutex_lock(&f->lock);
    for (unsigned i = 0; i < SM_FAULT_RULES; i++) {
        struct sm_fault_rule *r = &f->rules[i];

        if (matches(r, op, sector, sectors) && strikes(r))
            act(r, op, sectors, out);
    }
    pthread_mutex_unlock(&f->lock);
    if (out->delay_ns > SM_FAULT_MAX_DELAY_NS)
        out->delay_ns = SM_FAULT_MAX_DELAY_NS;
}
