/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Users and groups of the image, by the image specification's rules
 * (config.md, "User"): a number is always an id, with or without an entry; a
 * name must be listed; without a group the user's own group and every group
 * that lists the user apply; with one, only that. musl's getpw* would do, but
 * stops at the first odd line and cannot be given a text to test.
 *
 * Runs in the forked child, after the root has been switched. Files larger
 * than FILE_LIMIT_BYTES are cut there.
 */
#include "users.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILE_LIMIT_BYTES (4u << 20)

struct span {
    const char *at;
    size_t len;
};

static bool span_is(struct span s, struct span t)
{
    return s.len == t.len && memcmp(s.at, t.at, s.len) == 0;
}

/* Cut the text up to the next `stop` off the front of *rest. */
static struct span cut(struct span *rest, char stop)
{
    const char *end = rest->len ? memchr(rest->at, stop, rest->len) : NULL;
    struct span s = { rest->at, end ? (size_t)(end - rest->at) : rest->len };
    size_t used = end ? s.len + 1 : s.len;
    rest->at += used;
    rest->len -= used;
    return s;
}

/* A decimal id; 2^32-1 means "unchanged" to setresuid and is refused. */
static bool number(struct span s, uint32_t *out)
{
    uint64_t v = 0;
    if (s.len == 0 || s.len > 10)
        return false;
    for (size_t i = 0; i < s.len; i++) {
        if (s.at[i] < '0' || s.at[i] > '9')
            return false;
        v = v * 10 + (uint64_t)(s.at[i] - '0');
    }
    *out = (uint32_t)v;
    return v < UINT32_MAX;
}

static bool all_digits(struct span s)
{
    for (size_t i = 0; i < s.len; i++)
        if (s.at[i] < '0' || s.at[i] > '9')
            return false;
    return s.len > 0;
}

struct passwd_line {
    struct span name, home;
    uint32_t uid, gid;
};

static bool next_passwd(struct span *rest, struct passwd_line *out)
{
    while (rest->len) {
        struct span line = cut(rest, '\n');
        out->name = cut(&line, ':');
        cut(&line, ':');
        bool ok = number(cut(&line, ':'), &out->uid);
        ok = number(cut(&line, ':'), &out->gid) && ok;
        cut(&line, ':');
        out->home = cut(&line, ':');
        if (ok && out->name.len)
            return true;
    }
    return false;
}

struct group_line {
    struct span name, members;
    uint32_t gid;
};

static bool next_group(struct span *rest, struct group_line *out)
{
    while (rest->len) {
        struct span line = cut(rest, '\n');
        out->name = cut(&line, ':');
        cut(&line, ':');
        bool ok = number(cut(&line, ':'), &out->gid);
        out->members = cut(&line, ':');
        if (ok && out->name.len)
            return true;
    }
    return false;
}

static bool lists(struct span members, struct span name)
{
    while (members.len)
        if (span_is(cut(&members, ','), name))
            return true;
    return false;
}

static int find_user(struct span who, struct span passwd, struct sm_ident *out,
                     struct span *name)
{
    struct passwd_line line = { 0 };
    bool numeric = all_digits(who);
    uint32_t uid = 0;
    if (numeric && !number(who, &uid))
        return -ERANGE;
    while (next_passwd(&passwd, &line)) {
        if (numeric ? line.uid != uid : !span_is(line.name, who))
            continue;
        out->uid = line.uid;
        out->gid = line.gid;
        *name = line.name;
        if (line.home.len > 0 && line.home.len < sizeof(out->home)) {
            memcpy(out->home, line.home.at, line.home.len);
            out->home[line.home.len] = 0;
        }
        return 0;
    }
    out->uid = uid;
    return numeric ? 0 : -ENOENT;
}

static int find_group(struct span which, struct span group, uint32_t *gid)
{
    struct group_line line;
    if (all_digits(which))
        return number(which, gid) ? 0 : -ERANGE;
    while (next_group(&group, &line)) {
        if (span_is(line.name, which)) {
            *gid = line.gid;
            return 0;
        }
    }
    return -ENOENT;
}

static void add_memberships(struct span name, struct span group, struct sm_ident *out)
{
    struct group_line line;
    while (next_group(&group, &line) && out->group_count < SM_IDENT_GROUPS_MAX)
        if (line.gid != out->gid && lists(line.members, name))
            out->groups[out->group_count++] = line.gid;
}

int sm_ident_resolve(const char *spec, const char *passwd, size_t passwd_len,
                     const char *group, size_t group_len, struct sm_ident *out)
{
    memset(out, 0, sizeof(*out));
    strcpy(out->home, "/");
    struct span users = { passwd ? passwd : "", passwd ? passwd_len : 0 };
    struct span groups = { group ? group : "", group ? group_len : 0 };
    struct span rest = { spec ? spec : "", spec ? strlen(spec) : 0 };
    bool has_group = rest.len && memchr(rest.at, ':', rest.len);
    struct span who = cut(&rest, ':'), name = { NULL, 0 };
    if (who.len == 0)
        who = (struct span){ "0", 1 };
    if (has_group && rest.len == 0)
        has_group = false;
    if (rest.len && memchr(rest.at, ':', rest.len))
        return -EINVAL;
    int rc = find_user(who, users, out, &name);
    if (rc)
        return rc;
    if (has_group)
        return find_group(rest, groups, &out->gid);
    if (name.len)
        add_memberships(name, groups, out);
    return 0;
}

static char *slurp(const char *path, size_t *len)
{
    *len = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return NULL;
    char *text = NULL;
    size_t cap = 0;
    for (;;) {
        if (*len == cap) {
            size_t grown = cap ? cap * 2 : 4096;
            char *more = grown <= FILE_LIMIT_BYTES ? realloc(text, grown) : NULL;
            if (!more)
                break;
            text = more;
            cap = grown;
        }
        ssize_t n = read(fd, text + *len, cap - *len);
        if (n <= 0)
            break;
        *len += (size_t)n;
    }
    close(fd);
    return text;
}

int sm_ident_lookup(const char *spec, struct sm_ident *out)
{
    size_t passwd_len, group_len;
    char *passwd = slurp("/etc/passwd", &passwd_len);
    char *group = slurp("/etc/group", &group_len);
    int rc = sm_ident_resolve(spec, passwd, passwd_len, group, group_len, out);
    free(passwd);
    free(group);
    return rc;
}
