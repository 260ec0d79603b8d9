/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Faults on demand for a disk's requests: rules that the owner sets and the
 * disk's I/O thread executes. A rule matches an operation and a range of
 * sectors, lets `skip` matches pass, then acts on `count` of them, each with a
 * probability drawn from its own seeded generator; so the same requests and
 * the same seed give the same faults.
 *
 *   fail     the guest gets an I/O error, nothing is done
 *   delay    it waits first; together with other rules
 *   tear     a write puts down its first sectors only, how many is drawn; then
 *            the guest gets an I/O error, or with `silent` is told that all is
 *            well, as a disk that loses power in the middle would have
 *   corrupt  one bit, drawn, of what is read or of what lands on the disk
 *
 * Threads. Rules are behind a lock; judge runs on the I/O thread.
 */
#ifndef SM_FAULT_H
#define SM_FAULT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define SM_FAULT_RULES 16
#define SM_FAULT_MAX_DELAY_NS 10000000000ull

enum sm_fault_op { SM_FAULT_READ = 1, SM_FAULT_WRITE = 2, SM_FAULT_FLUSH = 4, SM_FAULT_ZERO = 8 };
enum sm_fault_action { SM_FAULT_FAIL, SM_FAULT_DELAY, SM_FAULT_TEAR, SM_FAULT_CORRUPT };

struct sm_fault_rule {
    bool used;
    unsigned ops; /* enum sm_fault_op */
    enum sm_fault_action action;
    bool silent;
    uint64_t first, last; /* sectors; a flush has none and matches any */
    uint64_t skip, count; /* still to pass, still to hit; count 0: no end */
    bool ends;            /* count was given */
    double probability;
    uint64_t delay_ns;
    uint64_t random; /* state of the generator: the seed at first */
    uint64_t matched, hits;
};

struct sm_faults {
    pthread_mutex_t lock;
    struct sm_fault_rule rules[SM_FAULT_RULES];
};

struct sm_fault_verdict {
    bool hit, fail, tear, silent, corrupt;
    uint64_t delay_ns;
    uint64_t tear_sectors; /* that are written */
    uint64_t corrupt_bit;  /* of the request's data */
};

void sm_faults_init(struct sm_faults *f);
void sm_faults_destroy(struct sm_faults *f);
int sm_faults_add(struct sm_faults *f, const struct sm_fault_rule *rule, unsigned *id); /* -ENOSPC */
int sm_faults_remove(struct sm_faults *f, unsigned id);                                 /* -ENOENT */
bool sm_faults_get(struct sm_faults *f, unsigned id, struct sm_fault_rule *out);
void sm_faults_judge(struct sm_faults *f, enum sm_fault_op op, uint64_t sector,
                     uint64_t sectors, struct sm_fault_verdict *out);

#endif
