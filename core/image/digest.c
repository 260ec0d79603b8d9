/* SPDX-License-Identifier: Apache-2.0 */
/* Digests over libcrypto; see digest.h. */
#include "digest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/evp.h>

#define FILE_CHUNK (256u << 10)

static bool is_lower_hex(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!((s[i] >= '0' && s[i] <= '9') || (s[i] >= 'a' && s[i] <= 'f')))
            return false;
    return s[n] == 0;
}

enum sm_digest_kind sm_digest_parse(const char *text)
{
    size_t len = strlen(text);

    if (len == 7 + 64 && !memcmp(text, "sha256:", 7) && is_lower_hex(text + 7, 64))
        return SM_DIGEST_SHA256;
    if (len == 7 + 128 && !memcmp(text, "sha512:", 7) && is_lower_hex(text + 7, 128))
        return SM_DIGEST_SHA512;
    return SM_DIGEST_NONE;
}

int sm_digest_reset(struct sm_digest *d)
{
    const EVP_MD *md = d->kind == SM_DIGEST_SHA512 ? EVP_sha512() : EVP_sha256();

    return EVP_DigestInit_ex(d->md, md, NULL) == 1 ? 0 : -EIO;
}

int sm_digest_open(struct sm_digest *d, enum sm_digest_kind kind)
{
    d->kind = kind;
    d->md = EVP_MD_CTX_new();
    if (!d->md)
        return -ENOMEM;
    if (sm_digest_reset(d) < 0) {
        sm_digest_close(d);
        return -EIO;
    }
    return 0;
}

int sm_digest_update(struct sm_digest *d, const void *data, size_t len)
{
    return EVP_DigestUpdate(d->md, data, len) == 1 ? 0 : -EIO;
}

int sm_digest_text(struct sm_digest *d, char text[SM_DIGEST_TEXT])
{
    static const char hex[] = "0123456789abcdef";
    unsigned char raw[EVP_MAX_MD_SIZE];
    unsigned len = 0;

    if (EVP_DigestFinal_ex(d->md, raw, &len) != 1)
        return -EIO;
    memcpy(text, d->kind == SM_DIGEST_SHA512 ? "sha512:" : "sha256:", 7);
    for (unsigned i = 0; i < len; i++) {
        text[7 + 2 * i] = hex[raw[i] >> 4];
        text[8 + 2 * i] = hex[raw[i] & 15];
    }
    text[7 + 2 * len] = 0;
    return 0;
}

void sm_digest_close(struct sm_digest *d)
{
    EVP_MD_CTX_free(d->md);
    d->md = NULL;
}

static int hash_fd(int fd, struct sm_digest *d, struct sm_image_progress *p)
{
    uint8_t *buf = malloc(FILE_CHUNK);
    int ret = buf ? 0 : -ENOMEM;

    while (ret == 0) {
        ssize_t n = read(fd, buf, FILE_CHUNK);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            ret = -errno;
        if (n <= 0)
            break;
        ret = sm_digest_update(d, buf, (size_t)n);
        if (p) {
            atomic_fetch_add(&p->now_bytes, (uint64_t)n);
            if (atomic_load(&p->cancel))
                ret = -ECANCELED;
        }
    }
    free(buf);
    return ret;
}

int sm_digest_file(const char *path, enum sm_digest_kind kind, char text[SM_DIGEST_TEXT],
                   struct sm_image_progress *p, struct sm_image_error *e)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct sm_digest d;
    struct stat st;
    int ret;

    if (fd < 0)
        return sm_image_fail(e, errno, "%s: %s", path, strerror(errno));
    if (p && fstat(fd, &st) == 0)
        atomic_store(&p->total_bytes, (uint64_t)st.st_size);
    ret = sm_digest_open(&d, kind);
    if (ret == 0) {
        ret = hash_fd(fd, &d, p);
        if (ret == 0)
            ret = sm_digest_text(&d, text);
        sm_digest_close(&d);
    }
    close(fd);
    return ret < 0 ? sm_image_fail(e, -ret, "%s: %s", path, strerror(-ret)) : 0;
}
