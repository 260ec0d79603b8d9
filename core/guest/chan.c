/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests in flight. A channel holds what one EXEC or FILE_* needs; it lives
 * from the request's frame to its last frame out, and is freed at the end of a
 * turn only, so that an event of the same turn finds no dangling pointer.
 *
 * Output: a stream is in the epoll set `streams` while it has credit, and that
 * set is watched only while the out queue is short. So one reader that stops
 * costs nothing to the others, and nothing is read that cannot be sent.
 *
 * After the process has been reaped its streams end as soon as they are empty,
 * even if a process it left behind holds the other end: that one's output is
 * read and dropped from then on, so that it neither blocks nor dies of SIGPIPE.
 */
#include "agent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <termios.h>
#include <unistd.h>

#define GRANT_BYTES (SM_STDIN_WINDOW_BYTES / 4)

static bool bit(const uint8_t *map, uint16_t id)
{
    return map[id / 8] >> (id % 8) & 1;
}

static void set_bit(uint8_t *map, uint16_t id, bool on)
{
    uint8_t mask = (uint8_t)(1u << (id % 8));
    map[id / 8] = (uint8_t)(on ? map[id / 8] | mask : map[id / 8] & ~mask);
}

struct sm_chan *sm_chan_find(struct sm_agent *a, uint16_t id)
{
    for (struct sm_chan *c = a->chans; c; c = c->next)
        if (c->id == id && !c->dead && !c->detached)
            return c;
    return NULL;
}

/* A stream nobody wants any more, read until its writers are gone. */
static void drain_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    char bytes[16384];
    struct sm_source *s = arg;
    (void)a;
    (void)events;
    ssize_t n = read(s->fd, bytes, sizeof(bytes));
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
        return;
    sm_source_close(s);
    free(s);
}

static void stream_abandon(struct sm_agent *a, struct sm_stream *s)
{
    s->open = false;
    if (s->src.fd < 0)
        return;
    int fd = dup(s->src.fd);
    sm_source_close(&s->src);
    struct sm_source *d = fd >= 0 ? calloc(1, sizeof(*d)) : NULL;
    if (!d || sm_source_add(a, d, a->epoll, fd, EPOLLIN, drain_ready, d)) {
        free(d);
        if (fd >= 0)
            close(fd);
    }
}

static void stream_end(struct sm_agent *a, struct sm_chan *c, unsigned i)
{
    sm_link_send(a, i ? SM_STDERR : SM_STDOUT, SM_FLAG_EOF, c->id, NULL, 0);
    c->out[i].open = false;
    sm_source_close(&c->out[i].src);
}

/* One read of a stream into the out queue. True when there may be more. */
static bool stream_pump(struct sm_agent *a, struct sm_chan *c, unsigned i)
{
    struct sm_stream *s = &c->out[i];
    if (c->dead || !s->open || s->src.fd < 0 || sm_link_full(a))
        return false;
    size_t want = s->credit < SM_FRAME_DATA_BYTES ? (size_t)s->credit : SM_FRAME_DATA_BYTES;
    if (want == 0) {
        sm_source_mute(&s->src);
        return false;
    }
    if (sm_buf_reserve(&a->out, SM_FRAME_HEADER_BYTES + want))
        return false;
    uint8_t *head = sm_buf_tail(&a->out);
    ssize_t n = read(s->src.fd, head + SM_FRAME_HEADER_BYTES, want);
    if (n < 0 && errno == EINTR)
        return true;
    if (n < 0 && errno == EAGAIN) {
        if (c->reaped) {
            sm_link_send(a, i ? SM_STDERR : SM_STDOUT, SM_FLAG_EOF, c->id, NULL, 0);
            stream_abandon(a, s);
        }
        return false;
    }
    if (n <= 0) { /* EOF, or EIO from a terminal whose other side is closed */
        stream_end(a, c, i);
        return false;
    }
    sm_frame_header(head, (uint32_t)n, i ? SM_STDERR : SM_STDOUT, 0, c->id);
    a->out.len += SM_FRAME_HEADER_BYTES + (size_t)n;
    s->credit -= (uint64_t)n;
    if (s->credit == 0)
        sm_source_mute(&s->src);
    return true;
}

static void stdout_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    (void)events;
    stream_pump(a, arg, 0);
    sm_chan_finish(a, arg);
}

static void stderr_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    (void)events;
    stream_pump(a, arg, 1);
    sm_chan_finish(a, arg);
}

int sm_chan_listen_out(struct sm_agent *a, struct sm_chan *c, unsigned stream, int fd,
                       uint32_t credit)
{
    struct sm_stream *s = &c->out[stream];
    s->credit = credit;
    int rc = sm_source_add(a, &s->src, a->streams, fd, EPOLLIN,
                           stream ? stderr_ready : stdout_ready, c);
    s->open = rc == 0;
    if (rc == 0 && credit == 0)
        sm_source_mute(&s->src);
    return rc;
}

void sm_chan_credit(struct sm_agent *a, struct sm_chan *c, unsigned stream, uint32_t bytes)
{
    struct sm_stream *s = &c->out[stream];
    s->credit += bytes;
    if (s->open && s->src.fd >= 0 && s->credit)
        sm_source_listen(&s->src, a->streams, EPOLLIN);
}

void sm_chan_drain(struct sm_agent *a, struct sm_chan *c)
{
    for (unsigned i = 0; i < 2; i++)
        while (stream_pump(a, c, i))
            ;
    sm_chan_finish(a, c);
}

static void grant(struct sm_agent *a, struct sm_chan *c, size_t bytes)
{
    c->ungranted += (uint32_t)bytes;
    if (c->ungranted < GRANT_BYTES || c->detached)
        return;
    uint8_t payload[4];
    sm_put32(payload, c->ungranted);
    sm_link_send(a, SM_STDIN_CREDIT, 0, c->id, payload, sizeof(payload));
    c->ungranted = 0;
}

static void stdin_close(struct sm_agent *a, struct sm_chan *c, bool tell)
{
    c->in_closed = true;
    sm_source_close(&c->in);
    sm_buf_free(&c->pending);
    if (tell && !c->detached)
        sm_link_send(a, SM_STDIN_CLOSED, 0, c->id, NULL, 0);
}

/* A terminal has no end of file, only a character that means it. */
static void tty_eof(struct sm_chan *c)
{
    struct termios t;
    uint8_t eof = 4;
    if (tcgetattr(c->tty, &t) == 0)
        eof = t.c_cc[VEOF];
    if (write(c->in.fd, &eof, 1) < 0)
        return; /* its queue is full of unread input: nothing better to do */
}

static void stdin_write(struct sm_agent *a, struct sm_chan *c, const uint8_t *data, size_t len)
{
    size_t done = 0;
    while (c->pending.len == 0 && done < len) {
        ssize_t n = write(c->in.fd, data + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0) {
            stdin_close(a, c, true);
            return;
        }
        done += (size_t)n;
    }
    if (done < len && sm_buf_append(&c->pending, data + done, len - done)) {
        stdin_close(a, c, true);
        return;
    }
    if (c->pending.len)
        sm_source_listen(&c->in, a->epoll, EPOLLOUT);
    grant(a, c, done);
}

static void stdin_ready(struct sm_agent *a, void *arg, uint32_t events)
{
    struct sm_chan *c = arg;
    (void)events;
    if (c->dead)
        return; /* over since this turn's events were taken: nothing follows */
    while (c->pending.len) {
        ssize_t n = write(c->in.fd, sm_buf_head(&c->pending), c->pending.len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0) {
            stdin_close(a, c, true);
            return;
        }
        sm_buf_consume(&c->pending, (size_t)n);
        grant(a, c, (size_t)n);
    }
    sm_buf_free(&c->pending);
    sm_source_mute(&c->in);
    if (c->in_eof && c->tty >= 0)
        tty_eof(c);
    else if (c->in_eof)
        stdin_close(a, c, false);
}

int sm_chan_listen_in(struct sm_agent *a, struct sm_chan *c, int fd)
{
    int rc = sm_source_add(a, &c->in, a->epoll, fd, EPOLLOUT, stdin_ready, c);
    /* What came while the request waited for its chain goes out on the first
     * event; otherwise there is nothing to write yet. */
    if (rc == 0 && c->pending.len == 0 && !c->in_eof)
        sm_source_mute(&c->in);
    return rc;
}

void sm_chan_stdin(struct sm_agent *a, struct sm_chan *c, const uint8_t *data, size_t len)
{
    if (c->in_closed || c->in_eof || len == 0)
        return;
    if (c->waiting)
        sm_buf_append(&c->pending, data, len);
    else if (c->kind == SM_CHAN_PUT)
        sm_file_write(a, c, data, len);
    else if (c->kind == SM_CHAN_EXEC && c->in.fd >= 0)
        stdin_write(a, c, data, len);
    if (c->kind == SM_CHAN_PUT && !c->waiting && !c->dead)
        grant(a, c, len);
}

void sm_chan_stdin_eof(struct sm_agent *a, struct sm_chan *c)
{
    if (c->in_eof)
        return;
    c->in_eof = true;
    if (c->waiting)
        return;
    if (c->kind == SM_CHAN_PUT) {
        sm_file_end(a, c);
    } else if (c->in.fd >= 0 && c->pending.len == 0) {
        if (c->tty >= 0)
            tty_eof(c);
        else
            stdin_close(a, c, false);
    }
}

void sm_chan_succeeded(struct sm_agent *a, struct sm_chan *c)
{
    if (!c->detached)
        set_bit(a->succeeded, c->id, true);
}

void sm_chan_finish(struct sm_agent *a, struct sm_chan *c)
{
    (void)a;
    if (c->kind == SM_CHAN_EXEC && c->reaped && !c->out[0].open && !c->out[1].open)
        c->dead = true;
}

void sm_chan_fail(struct sm_agent *a, struct sm_chan *c, int error, uint32_t stage,
                  const char *text)
{
    if (!c->detached)
        sm_link_failed(a, c->id, error, stage, text);
    c->dead = true;
    if (c->main) {
        bool missing = stage == SM_STAGE_EXEC && (error == ENOENT || error == ENOTDIR);
        sm_end_begin(a, SM_BYE_EXITED, missing ? 127 : 126, 0, 0, text);
    }
}

/* 1: succeeded, 0: not known yet, -1: failed, or never asked for. */
static int outcome(struct sm_agent *a, uint16_t id)
{
    if (bit(a->succeeded, id))
        return 1;
    struct sm_chan *c = sm_chan_find(a, id);
    return c && !c->reaped ? 0 : -1;
}

static void chan_start(struct sm_agent *a, struct sm_chan *c)
{
    c->waiting = false;
    if (c->kind == SM_CHAN_EXEC) {
        sm_exec_start(a, c);
        return;
    }
    sm_file_start(a, c);
    if (c->dead || c->kind != SM_CHAN_PUT)
        return;
    struct sm_buf early = c->pending;
    memset(&c->pending, 0, sizeof(c->pending));
    if (early.len) {
        sm_file_write(a, c, sm_buf_head(&early), early.len);
        if (!c->dead)
            grant(a, c, early.len);
    }
    sm_buf_free(&early);
    if (c->in_eof && !c->dead)
        sm_file_end(a, c);
}

/* Start what its chain allows; one pass, the caller repeats each turn. */
void sm_chan_run_chains(struct sm_agent *a)
{
    for (struct sm_chan *c = a->chans; c; c = c->next) {
        if (!c->waiting || c->dead)
            continue;
        struct sm_chain *chain = c->kind == SM_CHAN_EXEC ? &c->exec.chain : &c->file.chain;
        int all = 1;
        for (unsigned i = 0; i < chain->count && all > 0; i++)
            all = outcome(a, chain->ids[i]);
        if (all < 0)
            sm_chan_fail(a, c, ECANCELED, SM_STAGE_CHAIN, "what it waited for failed");
        else if (all > 0)
            chan_start(a, c);
    }
}

void sm_chan_open(struct sm_agent *a, enum sm_chan_kind kind, uint16_t id, const uint8_t *data,
                  size_t len)
{
    if (!a->booted || a->end || sm_chan_find(a, id)) {
        int error = !a->booted ? EAGAIN : a->end ? ESHUTDOWN : EBUSY;
        sm_link_failed(a, id, error, SM_STAGE_REQUEST,
                       !a->booted ? "not booted yet"
                       : a->end   ? "shutting down"
                                  : "channel in use");
        return;
    }
    struct sm_chan *c = calloc(1, sizeof(*c));
    if (!c) {
        sm_link_failed(a, id, ENOMEM, SM_STAGE_REQUEST, "out of memory");
        return;
    }
    c->id = id;
    c->kind = kind;
    c->waiting = true;
    c->in.fd = c->out[0].src.fd = c->out[1].src.fd = c->report.fd = c->tty = -1;
    set_bit(a->succeeded, id, false);
    /* At the end of the list, so that chains start in the order asked. */
    struct sm_chan **at = &a->chans;
    while (*at)
        at = &(*at)->next;
    *at = c;
    int rc = kind == SM_CHAN_EXEC ? sm_exec_parse(data, len, &c->exec)
                                  : sm_file_parse(data, len, &c->file);
    c->main = kind == SM_CHAN_EXEC && c->exec.flags & SM_EXECF_MAIN;
    if (rc) {
        sm_chan_fail(a, c, -rc, SM_STAGE_REQUEST, "malformed request");
        return;
    }
    sm_chan_run_chains(a);
}

/* What a broken connection leaves of the requests: the processes. */
void sm_chan_detach_all(struct sm_agent *a)
{
    for (struct sm_chan *c = a->chans; c; c = c->next) {
        bool running = c->kind == SM_CHAN_EXEC && c->pid > 0 && !c->reaped;
        c->detached = true;
        if (c->kind == SM_CHAN_PUT && c->put_created && !c->dead)
            unlink(c->file.path);
        stdin_close(a, c, false);
        stream_abandon(a, &c->out[0]);
        stream_abandon(a, &c->out[1]);
        if (!running)
            c->dead = true;
    }
}

void sm_chan_sweep(struct sm_agent *a)
{
    for (struct sm_chan **at = &a->chans; *at;) {
        struct sm_chan *c = *at;
        if (c->reaped && !c->dead)
            sm_chan_drain(a, c);
        if (!c->dead) {
            at = &c->next;
            continue;
        }
        *at = c->next;
        sm_source_close(&c->in);
        sm_source_close(&c->report);
        sm_source_close(&c->out[0].src);
        sm_source_close(&c->out[1].src);
        if (c->tty >= 0)
            close(c->tty);
        sm_buf_free(&c->pending);
        sm_exec_free(&c->exec);
        sm_file_free(&c->file);
        free(c);
    }
}
