/* SPDX-License-Identifier: Apache-2.0 */
/*
 * labd: PID 1 of a lab machine. It runs the commands that clients outside
 * send over the virtio-serial port and carries their streams (mux.h).
 *
 * One thread, one poll loop. Each command is a session: its own process
 * session, its own cgroup (so that nothing of it can outlive a killed
 * caller), and pipes or a pty. What a finished command left running in the
 * background stays, as it would on any machine, and its output is thrown
 * away. The init script beside this file has set up the machine by the time
 * labd starts.
 */
#define _GNU_SOURCE
#include "labd.h"
#include "request.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PORT_PATTERN "/dev/vport*p1"
#define CGROUP_ROOT "/sys/fs/cgroup/lab"
#define LIVE_ROOT "/lab/live"
#define OVERLAY_MAGIC 0x794c7630
#define GRACE_NS 500000000ll /* from SIGHUP to SIGKILL of an orphan */
#define PTY_SETTLE_NS 50000000ll
#define CLOCK_SLACK_NS 10000000ll

struct session {
    uint32_t chan;
    pid_t pid;
    int errfd;  /* carries the errno of a failed exec; -1 when known */
    int master; /* the pty, or -1 */
    bool exited, gone, signalled; /* signalled: by our client */
    int status;
    int64_t since_ns; /* of exited or gone */
    struct dst in;
    struct src out, err;
    struct session *next;
};

/* The read end of a pipe that some daemon still writes to. */
struct drain {
    int fd;
    struct drain *next;
};

struct labd {
    struct link host;
    int sigfd;
    sigset_t old_mask;
    struct session *sessions;
    struct drain *drains;
    struct labnet net;
    bool counting; /* instructions: the clock must be left alone */
    int64_t system_mtime; /* of the host's system folders, see refresh() */
};

static int64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return;
    if (write(fd, text, strlen(text)) < 0)
        fprintf(stderr, "labd: %s: %s\n", path, strerror(errno));
    close(fd);
}

/* --- the caller's files ------------------------------------------------ */

/*
 * System folders are a cached, read-only view of the host's with a layer of
 * ours on top. After the host installed a package the cache would lie about
 * names it has looked up before: drop it.
 */
static void refresh(struct labd *d)
{
    static const char *const folders[] = {
        "/etc",           "/usr/bin",       "/usr/sbin",
        "/usr/lib",       "/usr/local/bin", "/usr/local/lib",
        "/var/lib/dpkg/status",
    };
    int64_t newest = 0;

    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char path[128];
        struct stat st;

        snprintf(path, sizeof path, LIVE_ROOT "%s", folders[i]);
        if (!stat(path, &st))
            newest += st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec;
    }
    if (d->system_mtime && newest != d->system_mtime)
        write_text("/proc/sys/vm/drop_caches", "2\n");
    d->system_mtime = newest;
}

static bool on_overlay(const char *path)
{
    struct statfs fs;

    return statfs(path, &fs) || fs.f_type == OVERLAY_MAGIC;
}

static void make_folders(char *path)
{
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = '\0';
        mkdir(path, 0755);
        *p = '/';
    }
    mkdir(path, 0755);
}

/* Makes a folder below a system folder the caller's own, both ways. */
static void bind_live(const char *path)
{
    char live[PATH_MAX], target[PATH_MAX];
    struct stat st;

    if (path[0] != '/' || !strchr(path + 1, '/') || !on_overlay(path))
        return;
    snprintf(live, sizeof live, LIVE_ROOT "%s", path);
    if (stat(live, &st) || !S_ISDIR(st.st_mode))
        return;
    snprintf(target, sizeof target, "%s", path);
    make_folders(target);
    if (mount(live, target, NULL, MS_BIND, NULL))
        fprintf(stderr, "labd: bind %s: %s\n", path, strerror(errno));
}

/* --- starting a command ------------------------------------------------ */

struct command {
    struct request req;
    gid_t *groups;
    char *cwd, **argv, **env;
};

static void command_free(struct command *c)
{
    free(c->groups);
    free(c->argv);
    free(c->env);
}

static char *next_string(char **at, char *end)
{
    char *s = *at;
    char *nul = s < end ? memchr(s, 0, (size_t)(end - s)) : NULL;

    if (!nul)
        return NULL;
    *at = nul + 1;
    return s;
}

/* Points into data; three more environment slots are left for us. */
static int command_parse(struct command *c, char *data, size_t len)
{
    char *end = data + len, *at = data + sizeof c->req;
    struct request *r = &c->req;

    memset(c, 0, sizeof *c);
    if (len < sizeof *r)
        return -EPROTO;
    memcpy(r, data, sizeof *r);
    if (r->ngroups > len / 4 || r->argc > len || r->envc > len || !r->argc ||
        (size_t)(end - at) < r->ngroups * sizeof(uint32_t))
        return -EPROTO;
    c->groups = calloc(r->ngroups + 1, sizeof *c->groups);
    c->argv = calloc(r->argc + 1, sizeof *c->argv);
    c->env = calloc(r->envc + 4, sizeof *c->env);
    if (!c->groups || !c->argv || !c->env)
        return -ENOMEM;
    memcpy(c->groups, at, r->ngroups * sizeof(uint32_t));
    at += r->ngroups * sizeof(uint32_t);
    c->cwd = next_string(&at, end);
    for (uint32_t i = 0; i < r->argc; i++)
        c->argv[i] = next_string(&at, end);
    for (uint32_t i = 0; i < r->envc; i++)
        c->env[i] = next_string(&at, end);
    return c->cwd && c->argv[r->argc - 1] && (!r->envc || c->env[r->envc - 1])
               ? 0
               : -EPROTO;
}

static const char *env_get(const struct command *c, const char *name)
{
    size_t len = strlen(name);

    for (char **e = c->env; *e; e++)
        if (!strncmp(*e, name, len) && (*e)[len] == '=')
            return *e + len + 1;
    return NULL;
}

static void env_set(struct command *c, const char *name, const char *value)
{
    size_t len = strlen(name);
    char **e = c->env;
    char *pair = NULL;

    while (*e && (strncmp(*e, name, len) || (*e)[len] != '='))
        e++;
    if (asprintf(&pair, "%s=%s", name, value) > 0)
        *e = pair;
}

/* In the child: the caller's folders and our variables. */
static void command_world(struct command *c)
{
    static const char *const folders[] = {
        "TMPDIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
        "XDG_STATE_HOME", "SM_CACHE", "HOME",
    };
    char runtime[64];

    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        const char *path = env_get(c, folders[i]);

        if (path)
            bind_live(path);
    }
    bind_live(c->cwd);
    snprintf(runtime, sizeof runtime, "/run/user/%u", c->req.uid);
    mkdir(runtime, 0700);
    if (chown(runtime, c->req.uid, c->req.gid))
        fprintf(stderr, "labd: %s: %s\n", runtime, strerror(errno));
    env_set(c, "XDG_RUNTIME_DIR", runtime);
    env_set(c, "SM_LAB_DISK", "/lab/disk");
}

static void join_cgroup(uint32_t chan)
{
    char path[128];

    snprintf(path, sizeof path, CGROUP_ROOT "/%u", chan);
    mkdir(path, 0755);
    strcat(path, "/cgroup.procs");
    write_text(path, "0\n");
}

static void kill_cgroup(uint32_t chan)
{
    char path[128];

    snprintf(path, sizeof path, CGROUP_ROOT "/%u/cgroup.kill", chan);
    write_text(path, "1\n");
}

/* Cgroups whose last process is gone; the others refuse to be removed. */
static void sweep_cgroups(void)
{
    DIR *dir = opendir(CGROUP_ROOT);
    struct dirent *e;

    while (dir && (e = readdir(dir)))
        if (e->d_name[0] >= '0' && e->d_name[0] <= '9')
            unlinkat(dirfd(dir), e->d_name, AT_REMOVEDIR);
    if (dir)
        closedir(dir);
}

static int become_user(const struct command *c)
{
    const struct request *r = &c->req;
    struct rlimit nofile = { r->nofile_soft, r->nofile_hard };

    setrlimit(RLIMIT_NOFILE, &nofile);
    umask(r->umask);
    if (setgroups(r->ngroups, c->groups) || setgid(r->gid) || setuid(r->uid))
        return -errno;
    return chdir(c->cwd) ? -errno : 0;
}

/* Never returns. fds are the three standard streams. */
static void command_exec(struct labd *d, struct command *c, uint32_t chan,
                         const int fds[3], int errfd)
{
    int32_t err;

    join_cgroup(chan);
    command_world(c);
    setsid();
    if (c->req.flags & REQ_TTY)
        ioctl(fds[0], TIOCSCTTY, 0);
    for (int i = 0; i < 3; i++)
        dup2(fds[i], i);
    err = -become_user(c);
    if (!err) {
        sigprocmask(SIG_SETMASK, &d->old_mask, NULL);
        environ = c->env;
        execvp(c->argv[0], c->argv);
        err = errno;
    }
    if (write(errfd, &err, sizeof err) < 0)
        _exit(126);
    _exit(127);
}

/* Three streams: theirs[] for the child, the rest into the session. */
static int open_streams(struct session *s, const struct request *r,
                        int theirs[3])
{
    int in[2] = { -1, -1 }, out[2] = { -1, -1 }, err[2] = { -1, -1 };

    s->master = -1;
    if (r->flags & REQ_TTY) {
        struct winsize size = { .ws_row = r->rows, .ws_col = r->columns };
        char name[64];

        s->master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
        if (s->master < 0 || grantpt(s->master) || unlockpt(s->master) ||
            ptsname_r(s->master, name, sizeof name))
            return -errno;
        ioctl(s->master, TIOCSWINSZ, &size);
        in[0] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (in[0] < 0 || fchown(in[0], r->uid, r->gid))
            return -errno;
        in[1] = out[0] = s->master;
        out[1] = fcntl(in[0], F_DUPFD_CLOEXEC, 3);
    } else {
        if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC))
            return -errno;
        set_nonblock(in[1]);
        set_nonblock(out[0]);
    }
    if (r->flags & REQ_TTY_STDERR) {
        err[1] = fcntl(in[0], F_DUPFD_CLOEXEC, 3);
    } else {
        if (pipe2(err, O_CLOEXEC))
            return -errno;
        set_nonblock(err[0]);
    }
    theirs[0] = in[0];
    theirs[1] = out[1];
    theirs[2] = err[1];
    /* As the caller's user, so that /dev/stdout can be opened again. */
    for (int i = 0; i < 3; i++)
        if (fchown(theirs[i], r->uid, r->gid))
            return -errno;
    dst_init(&s->in, in[1], 0);
    src_init(&s->out, out[0], 1);
    src_init(&s->err, err[0], 2);
    s->in.keep = s->out.keep = s->master >= 0;
    if (r->flags & REQ_NO_STDIN)
        dst_eof(&s->in);
    return 0;
}

static void fail(struct labd *d, uint32_t chan, int err, const char *text)
{
    char data[128];
    int32_t code = err;
    int n = snprintf(data + 4, sizeof data - 4, "%s", text);

    memcpy(data, &code, 4);
    link_send(&d->host, chan, F_FAIL, 0, data, 4 + (size_t)n);
}

static void session_open(struct labd *d, uint32_t chan, const char *data,
                         size_t len)
{
    struct session *s = calloc(1, sizeof *s);
    char *copy = malloc(len);
    struct command c = { 0 };
    int theirs[3] = { -1, -1, -1 }, errfd[2] = { -1, -1 };
    int err = s && copy ? 0 : -ENOMEM;

    if (!err) {
        memcpy(copy, data, len);
        err = command_parse(&c, copy, len);
    }
    if (!err)
        err = open_streams(s, &c.req, theirs);
    if (!err && pipe2(errfd, O_CLOEXEC | O_NONBLOCK))
        err = -errno;
    if (!err) {
        sweep_cgroups();
        refresh(d);
        s->pid = fork();
        if (!s->pid)
            command_exec(d, &c, chan, theirs, errfd[1]);
        if (s->pid < 0)
            err = -errno;
    }
    for (int i = 0; i < 3; i++)
        if (theirs[i] >= 0)
            close(theirs[i]);
    if (errfd[1] >= 0)
        close(errfd[1]);
    command_free(&c);
    free(copy);
    if (err) {
        fail(d, chan, -err, "cannot set up the command");
        free(s);
        return;
    }
    s->chan = chan;
    s->errfd = errfd[0];
    s->next = d->sessions;
    d->sessions = s;
}

/* --- a running command ------------------------------------------------- */

static struct session *session_find(struct labd *d, uint32_t chan)
{
    struct session *s = d->sessions;

    while (s && s->chan != chan)
        s = s->next;
    return s;
}

static void session_gone(struct session *s)
{
    if (s->gone)
        return;
    s->gone = true;
    s->since_ns = now_ns();
    kill(-s->pid, SIGHUP);
    kill(-s->pid, SIGCONT);
    s->out.credit = s->err.credit = 0;
}

static void session_frame(struct session *s, struct labd *d,
                          const struct frame *f, const char *data)
{
    struct src *src = f->stream == 1 ? &s->out : &s->err;

    switch (f->type) {
    case F_DATA:
        dst_add(&s->in, &d->host, s->chan, data, f->len);
        break;
    case F_EOF:
        /* The pty's other half must stay open; ^D is data there. */
        if (s->master < 0)
            dst_eof(&s->in);
        break;
    case F_CREDIT:
        src->credit += frame_u32(f, data);
        break;
    case F_BROKEN:
        if (s->master < 0 || src == &s->err)
            src_close(src);
        break;
    case F_SIGNAL:
        s->signalled = true;
        if (f->len >= 2 && !s->exited)
            kill(data[1] ? -s->pid : s->pid, data[0]);
        break;
    case F_WINSIZE:
        if (f->len >= 4 && s->master >= 0) {
            struct winsize size = { 0 };

            memcpy(&size.ws_row, data, 2);
            memcpy(&size.ws_col, data + 2, 2);
            ioctl(s->master, TIOCSWINSZ, &size);
        }
        break;
    case F_CLOSE:
        session_gone(s);
        break;
    default:
        break;
    }
}

static void drain_add(struct labd *d, int fd)
{
    struct drain *drain = fd >= 0 ? calloc(1, sizeof *drain) : NULL;

    if (!drain) {
        if (fd >= 0)
            close(fd);
        return;
    }
    drain->fd = fd;
    drain->next = d->drains;
    d->drains = drain;
}

static void session_free(struct session *s, struct labd *d)
{
    if (s->errfd >= 0)
        close(s->errfd);
    if (s->master >= 0) {
        close(s->master);
    } else {
        drain_add(d, s->out.fd);
        dst_close(&s->in);
    }
    drain_add(d, s->err.fd);
    buf_free(&s->in.buf);
    free(s);
}

static void session_started(struct session *s, struct labd *d)
{
    int32_t err;
    ssize_t n = read(s->errfd, &err, sizeof err);

    if (n < 0 && errno == EAGAIN)
        return;
    close(s->errfd);
    s->errfd = -1;
    if (n == sizeof err) {
        fail(d, s->chan, err, "");
        s->gone = true;
        s->since_ns = 0;
    } else {
        link_send(&d->host, s->chan, F_OPENED, 0, "", 0);
    }
}

/* True when nothing more can come out of an exited command's stream. */
static bool src_dry(struct session *s, struct src *src, struct labd *d)
{
    long n = 1;

    while (n > 0 && src_wants(src))
        n = src_pump(src, &d->host, s->chan);
    if (src->fd < 0)
        return true;
    if (!src->credit)
        return false;
    return src->fd != s->master || now_ns() - s->since_ns > PTY_SETTLE_NS;
}

/* Returns false when the session is over and freed. */
static bool session_pump(struct session *s, struct labd *d)
{
    if (s->errfd >= 0)
        session_started(s, d);
    if (s->gone) {
        if (now_ns() - s->since_ns > GRACE_NS || s->exited)
            kill_cgroup(s->chan);
        if (!s->exited)
            return true;
        session_free(s, d);
        return false;
    }
    dst_pump(&s->in, &d->host, s->chan);
    if (s->exited) {
        if (s->errfd >= 0 || !src_dry(s, &s->out, d) || !src_dry(s, &s->err, d))
            return true;
        /* Stragglers of an interrupted run would only burn CPU here. */
        if (s->signalled && WIFSIGNALED(s->status))
            kill_cgroup(s->chan);
        link_send(&d->host, s->chan, F_EXIT, 0, &s->status, sizeof s->status);
        session_free(s, d);
        return false;
    }
    if (src_wants(&s->out))
        src_pump(&s->out, &d->host, s->chan);
    if (src_wants(&s->err))
        src_pump(&s->err, &d->host, s->chan);
    return true;
}

/* --- the loop ---------------------------------------------------------- */

static void reap(struct labd *d)
{
    struct signalfd_siginfo info;
    int status;
    pid_t pid;

    while (read(d->sigfd, &info, sizeof info) > 0)
        ;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (struct session *s = d->sessions; s; s = s->next)
            if (s->pid == pid) {
                s->exited = true;
                s->status = status;
                if (!s->gone)
                    s->since_ns = now_ns();
            }
}

static void power_off(void)
{
    sync();
    reboot(RB_POWER_OFF);
}

/* The emulated clock drifts; nobody sees it jump while nothing runs. */
static void set_clock(struct labd *d, const char *data)
{
    struct timespec ts;
    int64_t ns, off;

    memcpy(&ns, data, sizeof ns);
    clock_gettime(CLOCK_REALTIME, &ts);
    off = ns - (ts.tv_sec * 1000000000ll + ts.tv_nsec);
    if (d->counting || d->sessions || (off < CLOCK_SLACK_NS && -off < CLOCK_SLACK_NS))
        return;
    ts.tv_sec = ns / 1000000000;
    ts.tv_nsec = ns % 1000000000;
    clock_settime(CLOCK_REALTIME, &ts);
}

static void host_frame(struct labd *d, const struct frame *f, const char *data)
{
    struct session *s;

    switch (f->type) {
    case F_STOP:
        power_off();
        break;
    case F_CLOCK:
        if (f->len == sizeof(int64_t))
            set_clock(d, data);
        break;
    case F_OPEN:
        session_open(d, f->chan, data, f->len);
        break;
    default:
        s = session_find(d, f->chan);
        if (s)
            session_frame(s, d, f, data);
        else
            labnet_frame(&d->net, f, data);
        break;
    }
}

static void poll_add(struct pollfd *fds, size_t *n, int fd, short events)
{
    if (fd >= 0 && events)
        fds[(*n)++] = (struct pollfd){ .fd = fd, .events = events };
}

static size_t poll_count(const struct labd *d)
{
    size_t n = 8 + labnet_poll_count(&d->net);

    for (const struct session *s = d->sessions; s; s = s->next)
        n += 5;
    for (const struct drain *p = d->drains; p; p = p->next)
        n++;
    return n;
}

/* Fills fds and returns the time-out in milliseconds. */
static int poll_fill(struct labd *d, struct pollfd *fds, size_t *n)
{
    int timeout = -1;

    poll_add(fds, n, d->host.fd, link_events(&d->host));
    poll_add(fds, n, d->sigfd, POLLIN);
    for (struct session *s = d->sessions; s; s = s->next) {
        poll_add(fds, n, s->errfd, POLLIN);
        poll_add(fds, n, s->in.fd, dst_wants(&s->in) ? POLLOUT : 0);
        poll_add(fds, n, s->out.fd, src_wants(&s->out) ? POLLIN : 0);
        poll_add(fds, n, s->err.fd, src_wants(&s->err) ? POLLIN : 0);
        if (s->gone || s->exited)
            timeout = 20;
    }
    for (struct drain *p = d->drains; p; p = p->next)
        poll_add(fds, n, p->fd, POLLIN);
    labnet_poll_fill(&d->net, fds, n);
    return timeout;
}

static void drain_all(struct labd *d)
{
    char chunk[4096];

    for (struct drain **at = &d->drains; *at;) {
        struct drain *p = *at;
        ssize_t n = read(p->fd, chunk, sizeof chunk);

        if (n > 0 || (n < 0 && errno == EAGAIN)) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        close(p->fd);
        free(p);
    }
}

static void turn(struct labd *d)
{
    struct pollfd *fds = calloc(poll_count(d), sizeof *fds);
    size_t n = 0;
    int timeout;
    struct frame f;
    const char *data;

    if (!fds)
        return;
    timeout = poll_fill(d, fds, &n);
    if (poll(fds, n, timeout) < 0 && errno != EINTR)
        perror("labd: poll");
    reap(d);
    link_flush(&d->host);
    link_fill(&d->host);
    if (d->host.err)
        power_off();
    while (link_next(&d->host, &f, &data))
        host_frame(d, &f, data);
    labnet_turn(&d->net, fds, n);
    for (struct session **at = &d->sessions; *at;) {
        struct session *s = *at, *next = s->next;

        if (session_pump(s, d))
            at = &s->next;
        else
            *at = next;
    }
    drain_all(d);
    free(fds);
}

/* The port's node appears some time after its driver. */
static int open_port(void)
{
    for (int i = 0; i < 1000; i++) {
        glob_t found = { 0 };
        int fd = -1;

        if (!glob(PORT_PATTERN, 0, NULL, &found))
            fd = open(found.gl_pathv[0], O_RDWR | O_CLOEXEC | O_NONBLOCK);
        globfree(&found);
        if (fd >= 0)
            return fd;
        usleep(10000);
    }
    return -1;
}

int main(int argc, char **argv)
{
    struct labd d = { 0 };
    sigset_t mask;
    int fd = open_port();

    if (fd < 0) {
        perror("labd: " PORT_PATTERN);
        return 1;
    }
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigaddset(&mask, SIGPIPE);
    sigprocmask(SIG_BLOCK, &mask, &d.old_mask);
    d.sigfd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    link_init(&d.host, fd);
    mkdir(CGROUP_ROOT, 0755);
    d.net.relays.link = &d.host;
    d.counting = argc > 1 && !strcmp(argv[1], "--counting");
    labnet_start(&d.net);
    if (hold_kvm())
        perror("labd: /dev/kvm");
    link_send(&d.host, 0, F_READY, 0, "", 0);
    for (;;)
        turn(&d);
}
