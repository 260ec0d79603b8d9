/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stream a device or a backend saves itself into: little-endian fields in
 * named, versioned, length-prefixed sections. A reader that runs past a
 * section's end, or meets the wrong name or version, fails once and stays
 * failed, so a loader checks for an error at its end only.
 */
#ifndef SM_STATE_H
#define SM_STATE_H

#include <stddef.h>
#include <stdint.h>

/*
 * Bulk data that lies beside the stream, in a file: what a disk holds. A saver
 * appends a blob and notes its number in its section; a loader finds it by
 * that number. NULL in a writer or reader: there is no file.
 */
#define SM_STATE_BLOBS 64

struct sm_state_blob {
    uint64_t offset, len_bytes; /* in the file, page-aligned; holes read as zeros */
    uint32_t sum;               /* sm_sum_add of every unit that is not zero; not the saver's to set */
};

struct sm_state_blobs {
    int fd;
    uint64_t end; /* of the file; where the next blob goes */
    unsigned count;
    struct sm_state_blob list[SM_STATE_BLOBS];
};

struct sm_state_writer {
    struct sm_state_blobs *blobs;
    uint8_t *buf;
    size_t len, cap;
    size_t section; /* offset of the open section's length, 0: none */
    int error;      /* -ENOMEM */
};

struct sm_state_reader {
    const struct sm_state_blobs *blobs;
    const uint8_t *buf;
    size_t len, pos;
    size_t end; /* of the open section */
    int error;  /* -EBADMSG */
};

void sm_state_writer_init(struct sm_state_writer *w);
void sm_state_writer_free(struct sm_state_writer *w);
/* name: at most 8 characters. */
void sm_state_begin(struct sm_state_writer *w, const char *name, uint32_t version);
void sm_state_end(struct sm_state_writer *w);
void sm_state_put_u8(struct sm_state_writer *w, uint8_t v);
void sm_state_put_u16(struct sm_state_writer *w, uint16_t v);
void sm_state_put_u32(struct sm_state_writer *w, uint32_t v);
void sm_state_put_u64(struct sm_state_writer *w, uint64_t v);
void sm_state_put_bytes(struct sm_state_writer *w, const void *p, size_t len);

void sm_state_reader_init(struct sm_state_reader *r, const void *buf, size_t len);
/* Opens the next section; returns its version, or 0 and fails when the name
 * differs. */
uint32_t sm_state_open(struct sm_state_reader *r, const char *name);
void sm_state_close(struct sm_state_reader *r);
uint8_t sm_state_get_u8(struct sm_state_reader *r);
uint16_t sm_state_get_u16(struct sm_state_reader *r);
uint32_t sm_state_get_u32(struct sm_state_reader *r);
uint64_t sm_state_get_u64(struct sm_state_reader *r);
void sm_state_get_bytes(struct sm_state_reader *r, void *p, size_t len);
void sm_state_skip(struct sm_state_reader *r, size_t len);
/* Bytes left in the open section. */
size_t sm_state_left(const struct sm_state_reader *r);

#endif
