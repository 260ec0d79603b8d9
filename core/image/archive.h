/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Archives of whole images, both ways.
 *
 * Unpack: a tar (plain, gzip or zstd, from a file or a pipe) of blobs, as
 * `docker save` and OCI archives are. Its regular files go, one pass, into a
 * folder of the caller's under names of ours (0, 1, 2 …) and are hashed on the
 * way; names and links are only told, never used as paths. What the files mean
 * is the caller's business: the entries may come in any order.
 *
 * Pack: a folder of the host as the tar of a layer, entries in the order of
 * their names, with all metadata a layer can have (owners, xattrs, hard links,
 * devices; sockets are left out). It stays on one file system and follows no
 * link.
 *
 * Both run on the calling thread; progress may be cancelled from others.
 */
#ifndef SM_IMAGE_ARCHIVE_H
#define SM_IMAGE_ARCHIVE_H

#include "digest.h"

#define SM_ARCHIVE_ENTRIES_MAX 65536u

struct sm_archive_entry {
    char *name; /* as it stands in the tar */
    char *link; /* target of a symbolic or hard link, else NULL */
    uint64_t bytes;
    char digest[SM_DIGEST_TEXT]; /* sha256 of a regular file, else "" */
    uint32_t file;               /* its name in the folder */
};

struct sm_archive_result {
    struct sm_archive_entry *entries;
    uint32_t count;
};

struct sm_archive_config {
    const char *path; /* "-": standard input */
    const char *out;  /* an existing, empty folder */
    struct sm_image_limits limits;
    struct sm_image_progress *progress;
};

/* On an error the folder may hold files; the result is empty. */
int sm_archive_unpack(const struct sm_archive_config *cfg, struct sm_archive_result *r,
                      struct sm_image_error *e);
void sm_archive_result_free(struct sm_archive_result *r);

struct sm_pack_result {
    char digest[SM_DIGEST_TEXT];
    uint64_t bytes;
    uint64_t entries, skipped;
};

/* The folder dir as a tar in the new file out, which is removed on failure. */
int sm_archive_pack(const char *dir, const char *out, struct sm_pack_result *r,
                    struct sm_image_progress *p, struct sm_image_error *e);

#endif
