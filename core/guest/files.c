/* SPDX-License-Identifier: Apache-2.0 */
/*
 * FILE_PUT and FILE_GET, in the agent itself: bytes go between the connection
 * and the file a frame at a time, so a big file shares the turn with all else.
 * Special files are refused (they could block PID 1), folders too. A put that
 * fails removes the file if it made it.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int sm_make_folders(const char *path, mode_t mode, bool whole)
{
    char *copy = strdup(path);
    if (!copy)
        return -ENOMEM;
    int rc = 0;
    for (char *p = copy + 1; rc == 0; p++) {
        char *slash = strchr(p, '/');
        if (!slash && !whole)
            break;
        if (slash)
            *slash = 0;
        if (*p && mkdir(copy, mode) < 0 && errno != EEXIST && errno != EROFS)
            rc = -errno;
        if (!slash)
            break;
        *slash = '/';
        p = slash;
    }
    free(copy);
    return rc;
}

static void send_info(struct sm_agent *a, struct sm_chan *c)
{
    struct stat st;
    uint8_t info[SM_FILE_INFO_BYTES] = { 0 };
    if (fstat(c->in.fd, &st) == 0) {
        sm_put64(info, (uint64_t)st.st_size);
        sm_put64(info + 8, (uint64_t)st.st_mtim.tv_sec * 1000000000u +
                               (uint64_t)st.st_mtim.tv_nsec);
        sm_put32(info + 16, st.st_mode);
        sm_put32(info + 20, st.st_uid);
        sm_put32(info + 24, st.st_gid);
    }
    sm_link_send(a, SM_FILE_INFO, 0, c->id, info, sizeof(info));
}

static int check_regular(int fd)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISDIR(st.st_mode))
        return -EISDIR;
    return S_ISREG(st.st_mode) ? 0 : -EINVAL;
}

static int put_open(struct sm_chan *c)
{
    const struct sm_file_req *r = &c->file;
    int flags = O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    flags |= r->flags & SM_FILEF_APPEND ? O_APPEND : O_TRUNC;
    mode_t mode = r->has_mode ? r->mode : 0644;
    if (r->flags & SM_FILEF_PARENTS) {
        int rc = sm_make_folders(r->path, 0755, false);
        if (rc)
            return rc;
    }
    int fd = open(r->path, flags | O_CREAT | O_EXCL, mode);
    c->put_created = fd >= 0;
    if (fd < 0 && errno == EEXIST && !(r->flags & SM_FILEF_EXCL))
        fd = open(r->path, flags | O_CREAT, mode);
    if (fd < 0)
        return -errno;
    c->in.fd = fd;
    int rc = check_regular(fd);
    if (rc == 0 && (r->has_uid || r->has_gid) &&
        fchown(fd, r->has_uid ? r->uid : (uid_t)-1, r->has_gid ? r->gid : (gid_t)-1) < 0)
        rc = -errno;
    /* After chown, which clears the set-id bits, and whatever the umask. */
    if (rc == 0 && (r->has_mode || c->put_created) && fchmod(fd, mode) < 0)
        rc = -errno;
    return rc;
}

static void put_fail(struct sm_agent *a, struct sm_chan *c, int error)
{
    if (c->put_created)
        unlink(c->file.path);
    sm_chan_fail(a, c, error, SM_STAGE_FILE, c->file.path);
}

void sm_file_start(struct sm_agent *a, struct sm_chan *c)
{
    c->in.set = -1;
    if (c->kind == SM_CHAN_PUT) {
        int rc = put_open(c);
        if (rc)
            put_fail(a, c, -rc);
        return;
    }
    c->in.fd = open(c->file.path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    int rc = c->in.fd < 0 ? -errno : check_regular(c->in.fd);
    if (rc) {
        sm_chan_fail(a, c, -rc, SM_STAGE_FILE, c->file.path);
        return;
    }
    c->out[0].open = true;
    c->out[0].credit = c->file.window;
    send_info(a, c);
}

void sm_file_write(struct sm_agent *a, struct sm_chan *c, const uint8_t *data, size_t len)
{
    while (len > 0) {
        ssize_t n = write(c->in.fd, data, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            put_fail(a, c, errno);
            return;
        }
        data += n;
        len -= (size_t)n;
    }
}

void sm_file_end(struct sm_agent *a, struct sm_chan *c)
{
    send_info(a, c);
    /* Closed before any chained EXEC: a file open for writing does not run. */
    sm_source_close(&c->in);
    sm_chan_succeeded(a, c);
    c->dead = true;
}

/* One frame of a file being got. */
void sm_file_pump(struct sm_agent *a, struct sm_chan *c)
{
    struct sm_stream *s = &c->out[0];
    size_t want = s->credit < SM_FRAME_DATA_BYTES ? (size_t)s->credit : SM_FRAME_DATA_BYTES;
    if (sm_buf_reserve(&a->out, SM_FRAME_HEADER_BYTES + want))
        return;
    uint8_t *head = sm_buf_tail(&a->out);
    ssize_t n = read(c->in.fd, head + SM_FRAME_HEADER_BYTES, want);
    if (n > 0) {
        sm_frame_header(head, (uint32_t)n, SM_STDOUT, 0, c->id);
        a->out.len += SM_FRAME_HEADER_BYTES + (size_t)n;
        s->credit -= (uint64_t)n;
    } else if (n == 0) {
        sm_link_send(a, SM_STDOUT, SM_FLAG_EOF, c->id, NULL, 0);
        sm_chan_succeeded(a, c);
        c->dead = true;
    } else if (errno != EINTR) {
        sm_chan_fail(a, c, errno, SM_STAGE_FILE, c->file.path);
    }
}

/* True when another turn would find more to send. */
bool sm_file_pump_all(struct sm_agent *a)
{
    bool more = false;
    for (struct sm_chan *c = a->chans; c && !sm_link_full(a); c = c->next) {
        if (c->kind != SM_CHAN_GET || c->waiting || c->dead || c->out[0].credit == 0)
            continue;
        sm_file_pump(a, c);
        more = true;
    }
    return more;
}
