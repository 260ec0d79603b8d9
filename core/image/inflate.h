/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pull stream of decompressed bytes from a file.
 *
 * The format is sniffed from the first bytes, never believed from a media type:
 * gzip (RFC 1952, any number of members, bytes after the last member that are
 * not a member are ignored as gzip(1) does), zstd (RFC 8878, any number of
 * frames, skippable ones included) or plain. Other compressions are refused by
 * name. A stream that ends inside a member or frame is an error.
 *
 * gzip is ISA-L, or zlib when built with -DSM_NO_ISAL or without its header.
 * One thread uses a stream at a time.
 */
#ifndef SM_IMAGE_INFLATE_H
#define SM_IMAGE_INFLATE_H

#include "image.h"

struct sm_inflate;

/* fd stays the caller's. progress may be NULL; ratio bounds out/in, see image.h. */
int sm_inflate_open(struct sm_inflate **out, int fd, uint32_t ratio,
                    struct sm_image_progress *progress, struct sm_image_error *e);

/* "gzip", "zstd" or "plain". */
const char *sm_inflate_format(const struct sm_inflate *s);

/* Bytes produced, 0 at the end, -errno with text in e. */
long sm_inflate_read(struct sm_inflate *s, void *buf, size_t len, struct sm_image_error *e);

void sm_inflate_close(struct sm_inflate *s);

#endif
