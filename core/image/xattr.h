/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Extended attributes as a packed list: for each, u16 name length, u16 value
 * length, name, value; little endian, sorted by name, no name twice. Only names
 * that EROFS can hold are in a list (erofs_fs.h, xattr name indexes): user.*,
 * trusted.*, security.* and the two POSIX ACLs, whose values are passed through.
 */
#ifndef SM_IMAGE_XATTR_H
#define SM_IMAGE_XATTR_H

#include "image.h"

#define SM_XATTR_VALUE_MAX 65535u /* e_value_size is 16 bits */

struct sm_xattr {
    const char *name; /* not NUL-terminated */
    const uint8_t *value;
    uint16_t name_len, value_len;
};

/* EROFS name index and the length of the prefix it stands for; 0: unknown. */
uint8_t sm_xattr_index(const char *name, size_t len, size_t *prefix_len);

/* A name an image must not bring: it would talk to the guest's overlay. */
bool sm_xattr_forbidden(const char *name, size_t len);

/* 1 and the next attribute, 0 at the end, -EBADMSG for a malformed list. */
int sm_xattr_next(const uint8_t *list, size_t len, size_t *pos, struct sm_xattr *x);

/* Sorts by name and keeps the last of equal names; returns the new count. */
size_t sm_xattr_sort(struct sm_xattr *x, size_t n);

size_t sm_xattr_packed_bytes(const struct sm_xattr *x, size_t n);
void sm_xattr_pack(const struct sm_xattr *x, size_t n, uint8_t *out);

#endif
