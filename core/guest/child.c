/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From fork to execve, in the child. Everything here may block or fail: the
 * agent does not wait, and learns errno and stage through the report pipe.
 * Users are looked up before the identity is dropped, the working directory is
 * made and entered as root, as container engines do.
 */
#include "agent.h"
#include "users.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define KABI_CLOSE_RANGE 436
#define KABI_CLOSE_RANGE_CLOEXEC 4
#define TTY_GID 5

struct child {
    struct sm_agent *a;
    struct sm_exec_req *r;
    const struct sm_child_fds *fds;
    struct sm_ident who;
};

static void fail(const struct child *k, int error, uint32_t stage, const char *text)
    __attribute__((noreturn));

static void fail(const struct child *k, int error, uint32_t stage, const char *text)
{
    uint8_t word[256];
    size_t len = strnlen(text, sizeof(word) - 8);
    sm_put32(word, (uint32_t)error);
    sm_put32(word + 4, stage);
    memcpy(word + 8, text, len);
    if (write(k->fds->report, word, 8 + len) < 0)
        _exit(126);
    _exit(127);
}

static void set_stdio(const struct child *k)
{
    const struct sm_child_fds *f = k->fds;
    bool tty = f->tty >= 0;
    setsid();
    if (tty && ioctl(f->tty, TIOCSCTTY, 0) < 0)
        fail(k, errno, SM_STAGE_SPAWN, "controlling terminal");
    if (dup2(tty ? f->tty : f->in, 0) < 0 || dup2(tty ? f->tty : f->out, 1) < 0 ||
        dup2(tty ? f->tty : f->err, 2) < 0)
        fail(k, errno, SM_STAGE_SPAWN, "standard streams");
    syscall(KABI_CLOSE_RANGE, 3u, UINT_MAX, KABI_CLOSE_RANGE_CLOEXEC);
}

/* By system call: musl keeps three real-time signals to itself. */
static void set_signals(void)
{
    static const unsigned long dfl[4]; /* handler, flags, restorer, mask */
    static const unsigned long none;
    for (int sig = 1; sig <= 64; sig++)
        syscall(SYS_rt_sigaction, sig, dfl, NULL, 8);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
}

/*
 * Few open files by default and many allowed: programs that close every
 * possible descriptor stay quick, those that need many raise their own limit.
 */
static void set_limits(const struct child *k)
{
    struct rlimit files = { 1024, 524288 }, core = { 0, RLIM_INFINITY };
    struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };
    if (k->a->vm) {
        setrlimit(RLIMIT_NOFILE, &files);
        setrlimit(RLIMIT_CORE, &core);
        setrlimit(RLIMIT_NPROC, &all);
        int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
        if (fd >= 0 && write(fd, "0", 1) == 1)
            close(fd);
    }
    for (unsigned i = 0; i < k->r->rlimit_count; i++) {
        const struct sm_rlimit_set *l = &k->r->rlimits[i];
        struct rlimit one = { l->soft, l->hard };
        if (setrlimit((int)l->resource, &one) < 0)
            fail(k, errno, SM_STAGE_SPAWN, "resource limit");
    }
}

static void enter_folder(const struct child *k)
{
    const char *cwd = k->r->cwd && k->r->cwd[0] ? k->r->cwd : "/";
    if (chdir("/") < 0)
        fail(k, errno, SM_STAGE_CWD, "/");
    if (chdir(cwd) == 0)
        return;
    int rc = errno == ENOENT ? sm_make_folders(cwd, 0755, true) : -errno;
    if (rc || chdir(cwd) < 0)
        fail(k, rc ? -rc : errno, SM_STAGE_CWD, cwd);
}

/*
 * Who runs owns its streams: `/dev/stdout`, where many images write their
 * logs, is opened anew through /proc and needs the permission.
 */
static void own_streams(const struct child *k)
{
    if (k->fds->tty >= 0) {
        if (fchown(0, k->who.uid, TTY_GID) == 0)
            fchmod(0, 0620);
        return;
    }
    for (int fd = 0; fd < 3; fd++) {
        struct stat st;
        if (fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode) && fchown(fd, k->who.uid, k->who.gid))
            return; /* not root, in a test */
    }
}

static void become(const struct child *k)
{
    const struct sm_ident *who = &k->who;
    if (geteuid() != 0 && who->uid == geteuid())
        return; /* a test without privileges can only stay who it is */
    gid_t groups[SM_IDENT_GROUPS_MAX + SM_GROUPS_MAX];
    size_t count = 0;
    for (unsigned i = 0; i < who->group_count; i++)
        groups[count++] = who->groups[i];
    for (unsigned i = 0; i < k->r->group_count; i++)
        groups[count++] = k->r->groups[i];
    if (setgroups(count, groups) < 0 || setresgid(who->gid, who->gid, who->gid) < 0 ||
        setresuid(who->uid, who->uid, who->uid) < 0)
        fail(k, errno, SM_STAGE_USER, k->r->user ? k->r->user : "root");
}

static const char *env_get(const struct sm_exec_req *r, const char *name)
{
    size_t len = strlen(name);
    for (size_t i = 0; i < r->envc; i++)
        if (!strncmp(r->env[i], name, len) && r->env[i][len] == '=')
            return r->env[i] + len + 1;
    return NULL;
}

static void env_default(const struct child *k, const char *name, const char *value)
{
    struct sm_exec_req *r = k->r;
    if (env_get(r, name))
        return;
    size_t len = strlen(name) + strlen(value) + 2;
    char *entry = malloc(len);
    char **env = realloc(r->env, (r->envc + 2) * sizeof(*env));
    if (!entry || !env)
        fail(k, ENOMEM, SM_STAGE_SPAWN, "environment");
    strcpy(entry, name);
    strcat(entry, "=");
    strcat(entry, value);
    r->env = env;
    env[r->envc++] = entry;
    env[r->envc] = NULL;
}

static void set_env(const struct child *k)
{
    char host[HOST_NAME_MAX + 1] = "";
    env_default(k, "PATH", DEFAULT_PATH);
    env_default(k, "HOME", k->who.home);
    if (k->a->vm && gethostname(host, sizeof(host) - 1) == 0)
        env_default(k, "HOSTNAME", host);
    if (k->fds->tty >= 0)
        env_default(k, "TERM", "xterm");
}

/*
 * A file just put may still be open for writing in another child that has not
 * reached its execve: ETXTBSY passes, so try again for a while.
 */
static int exec_file(const struct child *k, const char *path)
{
    for (int tries = 0; tries < 200; tries++) {
        execve(path, k->r->argv, k->r->env);
        if (errno != ETXTBSY)
            break;
        usleep(5000);
    }
    return errno;
}

static void exec_argv(const struct child *k) __attribute__((noreturn));

static void exec_argv(const struct child *k)
{
    const char *name = k->r->argv[0];
    if (strchr(name, '/') || !name[0])
        fail(k, name[0] ? exec_file(k, name) : ENOENT, SM_STAGE_EXEC, name);
    int error = ENOENT;
    const char *path = env_get(k->r, "PATH");
    while (path && *path) {
        size_t len = strcspn(path, ":");
        char full[PATH_MAX];
        if (len > 0 && len + strlen(name) + 2 <= sizeof(full)) {
            memcpy(full, path, len);
            full[len] = '/';
            strcpy(full + len + 1, name);
            int e = exec_file(k, full);
            /* Not there is no news; anything else beats it. */
            if (e != ENOENT && e != ENOTDIR && (error == ENOENT || e != EACCES))
                error = e;
            if (e != ENOENT && e != ENOTDIR && e != EACCES)
                break;
        }
        path += len;
        path += *path == ':';
    }
    fail(k, error, SM_STAGE_EXEC, name);
}

void sm_child_run(struct sm_agent *a, struct sm_exec_req *r, const struct sm_child_fds *fds)
{
    struct child k = { .a = a, .r = r, .fds = fds };
    set_stdio(&k);
    set_signals();
    umask(022);
    int rc = sm_ident_lookup(r->user, &k.who);
    /* In a test without privileges, nobody named means who we are. */
    if (rc == 0 && !a->vm && !r->user && geteuid() != 0)
        k.who.uid = geteuid();
    if (rc)
        fail(&k, -rc, SM_STAGE_USER, r->user);
    set_limits(&k);
    if (r->flags & SM_EXECF_LAYER) {
        close(fds->report); /* all there is to start has been started */
        _exit(sm_layer_write(a, r->cwd) ? 1 : 0);
    }
    enter_folder(&k);
    own_streams(&k);
    become(&k);
    set_env(&k);
    exec_argv(&k);
}
