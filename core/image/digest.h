/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Content digests, "sha256:<hex>" and "sha512:<hex>" (image-spec, descriptor.md),
 * over libcrypto's EVP. A text digest is parsed strictly before anything is done
 * with it: a digest from a manifest also names files. Not thread safe per object.
 */
#ifndef SM_IMAGE_DIGEST_H
#define SM_IMAGE_DIGEST_H

#include "image.h"

enum sm_digest_kind { SM_DIGEST_NONE, SM_DIGEST_SHA256, SM_DIGEST_SHA512 };

#define SM_DIGEST_TEXT 136 /* "sha512:" + 128 + NUL */

struct sm_digest {
    void *md; /* EVP_MD_CTX, NULL when closed */
    enum sm_digest_kind kind;
};

/* The kind of a well-formed lowercase digest, else SM_DIGEST_NONE. */
enum sm_digest_kind sm_digest_parse(const char *text);

int sm_digest_open(struct sm_digest *d, enum sm_digest_kind kind);
int sm_digest_reset(struct sm_digest *d);
int sm_digest_update(struct sm_digest *d, const void *data, size_t len);
/* Ends the hash; only reset or close may follow. */
int sm_digest_text(struct sm_digest *d, char text[SM_DIGEST_TEXT]);
void sm_digest_close(struct sm_digest *d);

/* Digest of a whole file. p may be NULL. */
int sm_digest_file(const char *path, enum sm_digest_kind kind, char text[SM_DIGEST_TEXT],
                   struct sm_image_progress *p, struct sm_image_error *e);

#endif
