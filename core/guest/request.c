/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The field lists of BOOT, EXEC and FILE_* as structs. Strings are copied and
 * terminated; lists grow by doubling; everything has a limit, and an unknown
 * field is an error, so that neither side believes a wish was granted that was
 * not even read.
 */
#include "request.h"
#include "proto.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int take_text(const struct sm_field *f, char **out)
{
    char *s = sm_field_text(f);
    if (!s)
        return -errno;
    free(*out);
    *out = s;
    return 0;
}

/* Append a copy of the field to a NULL-terminated list. */
static int push_text(const struct sm_field *f, char ***list, size_t *count)
{
    /* Capacity is the next power of two above count, so grow at each one. */
    if ((*count & (*count - 1)) == 0 || !*list) {
        size_t cap = *count ? *count * 2 : 2;
        char **grown = realloc(*list, (cap + 1) * sizeof(**list));
        if (!grown)
            return -ENOMEM;
        *list = grown;
    }
    char *s = sm_field_text(f);
    (*list)[*count] = s;
    if (!s)
        return -errno;
    (*list)[++*count] = NULL;
    return 0;
}

static void free_list(char **list, size_t count)
{
    for (size_t i = 0; i < count; i++)
        free(list[i]);
    free(list);
}

static int take_u32(const struct sm_field *f, uint32_t *out)
{
    return sm_field_u32(f, out) ? 0 : -EPROTO;
}

static int push_chain(const struct sm_field *f, struct sm_chain *chain)
{
    if (chain->count == SM_CHAIN_MAX || !sm_field_u16(f, &chain->ids[chain->count]))
        return -EPROTO;
    return chain->ids[chain->count++] ? 0 : -EINVAL;
}

static int push_rlimit(const struct sm_field *f, struct sm_exec_req *r)
{
    if (f->len != 20 || r->rlimit_count == SM_RLIMITS_MAX)
        return -EPROTO;
    struct sm_rlimit_set *l = &r->rlimits[r->rlimit_count++];
    l->resource = sm_get32(f->value);
    l->soft = sm_get64(f->value + 4);
    l->hard = sm_get64(f->value + 12);
    return 0;
}

static int exec_field(const struct sm_field *f, struct sm_exec_req *r)
{
    switch (f->tag) {
    case SM_EXEC_ARG:
        return push_text(f, &r->argv, &r->argc);
    case SM_EXEC_ENV:
        return push_text(f, &r->env, &r->envc);
    case SM_EXEC_CWD:
        return take_text(f, &r->cwd);
    case SM_EXEC_USER:
        return take_text(f, &r->user);
    case SM_EXEC_FLAGS:
        return take_u32(f, &r->flags);
    case SM_EXEC_STOP:
        return take_u32(f, &r->stop_signal);
    case SM_EXEC_SIZE:
        if (f->len != 4)
            return -EPROTO;
        r->rows = sm_get16(f->value);
        r->columns = sm_get16(f->value + 2);
        return 0;
    case SM_EXEC_WINDOW:
        if (f->len != 8)
            return -EPROTO;
        r->window[0] = sm_get32(f->value);
        r->window[1] = sm_get32(f->value + 4);
        return 0;
    case SM_EXEC_RLIMIT:
        return push_rlimit(f, r);
    case SM_EXEC_CHAIN:
        return push_chain(f, &r->chain);
    case SM_EXEC_GROUP:
        if (r->group_count == SM_GROUPS_MAX)
            return -EPROTO;
        return take_u32(f, &r->groups[r->group_count++]);
    default:
        return -EPROTO;
    }
}

int sm_exec_parse(const uint8_t *data, size_t len, struct sm_exec_req *out)
{
    memset(out, 0, sizeof(*out));
    out->window[0] = out->window[1] = SM_STDIN_WINDOW_BYTES;
    struct sm_field f;
    size_t at = 0;
    int rc;
    while ((rc = sm_field_next(data, len, &at, &f)) > 0) {
        rc = exec_field(&f, out);
        if (rc)
            return rc;
    }
    if (rc)
        return rc;
    if (out->argc == 0 || out->flags & ~(uint32_t)SM_EXECF_ALL || out->stop_signal > 64)
        return -EINVAL;
    return 0;
}

void sm_exec_free(struct sm_exec_req *r)
{
    free_list(r->argv, r->argc);
    free_list(r->env, r->envc);
    free(r->cwd);
    free(r->user);
    memset(r, 0, sizeof(*r));
}

static int file_field(const struct sm_field *f, struct sm_file_req *r)
{
    switch (f->tag) {
    case SM_FILE_PATH:
        return take_text(f, &r->path);
    case SM_FILE_MODE:
        r->has_mode = true;
        return take_u32(f, &r->mode);
    case SM_FILE_UID:
        r->has_uid = true;
        return take_u32(f, &r->uid);
    case SM_FILE_GID:
        r->has_gid = true;
        return take_u32(f, &r->gid);
    case SM_FILE_FLAGS:
        return take_u32(f, &r->flags);
    case SM_FILE_WINDOW:
        return take_u32(f, &r->window);
    case SM_FILE_CHAIN:
        return push_chain(f, &r->chain);
    default:
        return -EPROTO;
    }
}

int sm_file_parse(const uint8_t *data, size_t len, struct sm_file_req *out)
{
    memset(out, 0, sizeof(*out));
    out->window = SM_STDIN_WINDOW_BYTES;
    struct sm_field f;
    size_t at = 0;
    int rc;
    while ((rc = sm_field_next(data, len, &at, &f)) > 0) {
        rc = file_field(&f, out);
        if (rc)
            return rc;
    }
    if (rc)
        return rc;
    if (!out->path || out->path[0] != '/' || out->mode & ~07777u ||
        out->flags & ~(uint32_t)SM_FILEF_ALL)
        return -EINVAL;
    return 0;
}

void sm_file_free(struct sm_file_req *r)
{
    free(r->path);
    memset(r, 0, sizeof(*r));
}

/* type NUL source NUL target NUL options */
static int push_mount(const struct sm_field *f, struct sm_boot_req *r)
{
    if (r->mount_count == SM_MOUNTS_MAX)
        return -EPROTO;
    char **parts[4];
    struct sm_mount_req *m = &r->mounts[r->mount_count++];
    parts[0] = &m->type;
    parts[1] = &m->source;
    parts[2] = &m->target;
    parts[3] = &m->options;
    const uint8_t *at = f->value, *end = f->value + f->len;
    for (int i = 0; i < 4; i++) {
        const uint8_t *stop = at < end ? memchr(at, 0, (size_t)(end - at)) : NULL;
        if ((i < 3) != (stop != NULL))
            return -EPROTO;
        if (!stop)
            stop = end;
        struct sm_field part = { .len = (uint32_t)(stop - at), .value = at };
        int rc = take_text(&part, parts[i]);
        if (rc)
            return rc;
        at = stop + 1;
    }
    return m->target[0] == '/' ? 0 : -EINVAL;
}

/* mac, mtu, and four strings, each with its NUL */
static int push_net(const struct sm_field *f, struct sm_boot_req *r)
{
    if (r->net_count == SM_NETS_MAX || f->len < 14)
        return -EPROTO;
    struct sm_net_req *n = &r->nets[r->net_count++];
    char *parts[4] = { n->ip4, n->gw4, n->ip6, n->gw6 };
    const uint8_t *at = f->value + 10, *end = f->value + f->len;
    memcpy(n->mac, f->value, 6);
    n->mtu = sm_get32(f->value + 6);
    for (int i = 0; i < 4; i++) {
        const uint8_t *stop = at < end ? memchr(at, 0, (size_t)(end - at)) : NULL;
        if (!stop || stop - at >= (long)sizeof(n->ip4))
            return -EPROTO;
        memcpy(parts[i], at, (size_t)(stop - at) + 1);
        at = stop + 1;
    }
    return at == end ? 0 : -EPROTO;
}

static int boot_field(const struct sm_field *f, struct sm_boot_req *r)
{
    switch (f->tag) {
    case SM_BOOT_ROOT:
        return take_u32(f, &r->root);
    case SM_BOOT_HOSTNAME:
        return take_text(f, &r->hostname);
    case SM_BOOT_HOSTS:
        return take_text(f, &r->hosts);
    case SM_BOOT_RESOLV:
        return take_text(f, &r->resolv);
    case SM_BOOT_CLOCK:
        if (f->len != 8)
            return -EPROTO;
        r->has_clock = true;
        r->clock_ns = sm_get64(f->value);
        return 0;
    case SM_BOOT_ENTROPY:
        if (f->len > 4096 || r->entropy)
            return -EPROTO;
        r->entropy = malloc(f->len + 1u);
        if (!r->entropy)
            return -ENOMEM;
        memcpy(r->entropy, f->value, f->len);
        r->entropy_len = f->len;
        return 0;
    case SM_BOOT_MOUNT:
        return push_mount(f, r);
    case SM_BOOT_GRACE:
        r->has_grace = true;
        return take_u32(f, &r->grace_ms);
    case SM_BOOT_NET:
        return push_net(f, r);
    case SM_BOOT_FLAGS:
        return take_u32(f, &r->flags);
    case SM_BOOT_MACHINE_ID:
        return f->len == 32 ? take_text(f, &r->machine_id) : -EPROTO;
    default:
        return -EPROTO;
    }
}

int sm_boot_parse(const uint8_t *data, size_t len, struct sm_boot_req *out)
{
    memset(out, 0, sizeof(*out));
    struct sm_field f;
    size_t at = 0;
    int rc;
    while ((rc = sm_field_next(data, len, &at, &f)) > 0) {
        rc = boot_field(&f, out);
        if (rc)
            return rc;
    }
    if (rc)
        return rc;
    if (out->root > SM_ROOT_INITRAMFS || out->flags & ~(uint32_t)SM_BOOTF_ALL ||
        (out->hostname && strlen(out->hostname) > 64))
        return -EINVAL;
    return 0;
}

void sm_boot_free(struct sm_boot_req *r)
{
    for (unsigned i = 0; i < r->mount_count; i++) {
        free(r->mounts[i].type);
        free(r->mounts[i].source);
        free(r->mounts[i].target);
        free(r->mounts[i].options);
    }
    free(r->hostname);
    free(r->hosts);
    free(r->resolv);
    free(r->machine_id);
    free(r->entropy);
    memset(r, 0, sizeof(*r));
}
