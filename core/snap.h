/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Snapshots: a whole VM in one file that never changes again.
 *
 *   0          header, 4 KiB: magic, version, architecture, page size, host
 *              fingerprint, id, parent, and where the sections are
 *   2 MiB …    RAM, one area a region, aligned so that huge pages fit; holes
 *              are zero pages. Restored by mapping the file privately: nothing
 *              is read before the guest asks, clones share the page cache
 *   …          what writable disks hold, sparse too (disk.h)
 *   …          STATE   the sections of core/vm_state.c
 *              META    the owner's words about it (JSON from Lua), not ours
 *              INDEX   40 bytes for each area
 *              PAGES   of a diff: one bit a page of RAM, set where the page is this
 *                      file's (a hole there is a zero page); the others are its
 *                      parent's, found by id
 *
 * Versions. 1: no PAGES. 2: with PAGES. A snapshot is written in the lowest version
 * that can say it, and all of them are read.
 *
 * Diffs. A VM whose memory lies over a snapshot's file, because it was loaded from
 * it (not eagerly) or was laid over it when that was saved (`rebase`), has private
 * pages exactly where it wrote since; the kernel knows them (bit 61 of
 * /proc/self/pagemap is clear), so nothing is tracked while it runs. They alone are
 * what a diff holds. Chains end after SM_SNAP_CHAIN_MAX files: sm_snap_flatten makes
 * one file of them.
 *
 * Checks. Header, STATE, META, INDEX and PAGES carry a CRC-32C each and are held
 * against it at every open, the file's length against the header's, so every
 * truncation and every flipped bit there is one clear error. RAM and disks are
 * summed when they are written and held against that by sm_snap_verify, once,
 * when a snapshot is registered: reading all of it at every restore would cost
 * more than all the rest of a restore.
 *
 * What is not promised: authenticity. A snapshot is a machine's memory; who
 * can write it owns the machine. It is trusted as its folder is. A forged one
 * cannot make the VMM do more than a hostile guest can: what it says is checked
 * like a guest's words.
 *
 * The file must not be changed while a VM runs from it; it is made read-only,
 * and removing its name is fine.
 *
 * Threads: the VM's owner; sm_snap alone: one thread at a time.
 */
#ifndef SM_SNAP_H
#define SM_SNAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sm_hv;
struct sm_vm;
struct sm_working_set;

#define SM_SNAP_VERSION 2 /* the newest we know */
#define SM_SNAP_CHAIN_MAX 16
#define SM_SNAP_ID_BYTES 16
#define SM_SNAP_META_MAX (1u << 20)

struct sm_snap_info {
    uint32_t version;
    char arch[16];         /* "x86_64" */
    char fingerprint[160]; /* sm_hv_fingerprint of where it was taken */
    uint8_t id[SM_SNAP_ID_BYTES], parent[SM_SNAP_ID_BYTES]; /* zeros: none */
    uint32_t cpus, page_bytes;
    uint64_t created_ns; /* CLOCK_REALTIME */
    uint64_t ram_bytes, file_bytes;
    bool diff; /* it needs the snapshot with the id `parent` */
};

struct sm_snap;

/* fd becomes the snapshot's, also on failure. err gets one line. -EBADMSG:
 * damaged or no snapshot; -ENOTSUP: of a newer version. */
int sm_snap_open(int fd, struct sm_snap **out, char *err, size_t errlen);
void sm_snap_close(struct sm_snap *snap);
const struct sm_snap_info *sm_snap_info(const struct sm_snap *snap);
const void *sm_snap_meta(const struct sm_snap *snap, size_t *len);

/* Who is told how far the reading of all of it is; zeros but for `tell`. */
struct sm_snap_progress {
    void (*tell)(struct sm_snap_progress *p); /* now and then */
    uint64_t done_bytes, total_bytes, told_bytes;
};

/* Read RAM and disks against their sums; progress may be NULL. */
int sm_snap_verify(struct sm_snap *snap, struct sm_snap_progress *progress, char *err,
                   size_t errlen);

/*
 * Writing. A VM that goes on stands still for `capture` alone:
 *
 *   begin     an empty file; nothing is written yet
 *   copy      live: memory, piece by piece, while the VM runs
 *   capture   paused: memory that has changed since, or all; vCPUs, devices, disks
 *   finish    sums, and the header that makes a snapshot of it; the VM runs again
 *
 * In `capture` after a copy the kernel tells which pages were written since (soft-
 * dirty bits, Documentation/admin-guide/mm/soft-dirty.rst); where it does not, as on
 * arm64, each is compared with the file, which is still cheaper than writing it.
 */
struct sm_snap_how {
    bool diff;   /* only what is not in the snapshot its memory lies over */
    bool rebase; /* lay the VM's memory over this file, for the next diff; where that
                  * cannot be (shared or foreign memory), it is left as it is */
    bool live;   /* `copy` is going to be called */
};

struct sm_snap_writer;

/* fd becomes the writer's, also on failure. -EEXIST: no empty file; -ESRCH: a diff of a
 * VM whose memory lies over no snapshot. */
int sm_snap_begin(struct sm_vm *vm, int fd, const struct sm_snap_how *how,
                  struct sm_snap_writer **out, char *err, size_t errlen);
/* The next max_bytes of memory; *left: how much is still to be looked at. */
int sm_snap_copy(struct sm_snap_writer *w, uint64_t max_bytes, uint64_t *left, char *err,
                 size_t errlen);
int sm_snap_capture(struct sm_snap_writer *w, char *err, size_t errlen);
/* meta: SM_SNAP_META_MAX at most. sync: be durable before returning. *stored_bytes:
 * how many of the file's are not holes. */
int sm_snap_finish(struct sm_snap_writer *w, const void *meta, size_t meta_len, bool sync,
                   struct sm_snap_info *out, uint64_t *stored_bytes, char *err, size_t errlen);
/* What is in the file then is no snapshot, unless it was finished. */
void sm_snap_writer_close(struct sm_snap_writer *w);

struct sm_snap_load {
    bool eager;   /* read all of RAM now, and depend on the file no longer */
    bool advance; /* the guest's clocks move on by the time that went by */
    struct sm_snap *const *parents; /* of a diff: from the one that is none on */
    unsigned parent_count;
    const struct sm_working_set *set; /* NULL: none */
    uint64_t set_bytes;               /* out: how much of its memory came out of that */
};

/* Into a new VM without memory, with the devices that the snapshot has. Refused
 * with one line where the CPU or the backend is another. */
int sm_snap_load(struct sm_snap *snap, struct sm_vm *vm, struct sm_snap_load *how,
                 char *err, size_t errlen);

/*
 * One file out of a chain, the last of which it stands for, with its id: nobody
 * needs to know. Everything is verified first. links: from the one that is no diff
 * on; fd: an empty file; progress may be NULL.
 */
int sm_snap_flatten(struct sm_snap *const *links, unsigned count, int fd,
                    struct sm_snap_progress *progress, char *err, size_t errlen);

#endif
