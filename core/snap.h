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
 *
 * Checks. Header, STATE, META and INDEX carry a CRC-32C each and are held
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

#define SM_SNAP_VERSION 1
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
};

struct sm_snap;

/* fd becomes the snapshot's, also on failure. err gets one line. -EBADMSG:
 * damaged or no snapshot; -ENOTSUP: of a newer version. */
int sm_snap_open(int fd, struct sm_snap **out, char *err, size_t errlen);
void sm_snap_close(struct sm_snap *snap);
const struct sm_snap_info *sm_snap_info(const struct sm_snap *snap);
const void *sm_snap_meta(const struct sm_snap *snap, size_t *len);
/* Read RAM and disks against their sums. */
int sm_snap_verify(struct sm_snap *snap, char *err, size_t errlen);

struct sm_snap_save {
    const void *meta;
    size_t meta_len;
    const uint8_t *parent; /* SM_SNAP_ID_BYTES, NULL: none */
    bool sync;             /* be durable before returning */
};

/* Write a paused VM into an empty file. *out says what was made, and
 * *stored_bytes how many of them are not holes. */
int sm_snap_save(struct sm_vm *vm, int fd, const struct sm_snap_save *how,
                 struct sm_snap_info *out, uint64_t *stored_bytes, char *err, size_t errlen);

struct sm_snap_load {
    bool eager;   /* read all of RAM now, and depend on the file no longer */
    bool advance; /* the guest's clocks move on by the time that went by */
};

/* Into a new VM without memory, with the devices that the snapshot has. Refused
 * with one line where the CPU or the backend is another. */
int sm_snap_load(struct sm_snap *snap, struct sm_vm *vm, const struct sm_snap_load *how,
                 char *err, size_t errlen);

#endif
