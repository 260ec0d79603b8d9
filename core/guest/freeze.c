/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The workload stands still: from before the machine is saved until a copy of it
 * has its own clock and identity, so that no program ever runs with those of its
 * source. It notices nothing but the time that has passed.
 *
 * The freezer of cgroup v2 does it (Documentation/admin-guide/cgroup-v2.rst). The
 * root cgroup cannot be frozen, so what lives in it, all but ourselves and the
 * kernel's threads, moves into one of ours, at the first freeze; a process pays
 * nothing before. Cgroups that the workload made are frozen where they are; one
 * that is frozen already is left to whoever did it.
 *
 * The descriptors of both file systems are opened at boot: what the workload mounts
 * or unmounts later changes nothing.
 */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HOME "workload"   /* the cgroup that those of the root move into */
#define GROUPS_MAX 64     /* of the root, that we freeze */
#define ROUNDS_MAX 16     /* of moving */
#define WAIT_MS 1000

static struct {
    int cgroups, proc;     /* folders, or -1 */
    int held[GROUPS_MAX];  /* cgroup.freeze of those we froze */
    unsigned held_count;
} freezer = { .cgroups = -1, .proc = -1 };

void sm_freeze_init(void)
{
    freezer.cgroups = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    freezer.proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* At most len - 1 bytes of a small file, terminated. */
static int read_text(int dir, const char *path, char *buf, size_t len)
{
    int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, buf, len - 1);
    int rc = n < 0 ? -errno : 0;
    if (fd >= 0)
        close(fd);
    buf[n < 0 ? 0 : n] = 0;
    return rc;
}

static int write_text(int dir, const char *path, const char *text)
{
    int fd = openat(dir, path, O_WRONLY | O_CLOEXEC);
    int rc = fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0;
    if (fd >= 0)
        close(fd);
    return rc;
}

/* kthreadd is process 2, and the parent of all others. */
static bool is_kernel_thread(long pid)
{
    char path[32], stat[512];
    snprintf(path, sizeof(path), "%ld/stat", pid);
    if (pid == 2 || read_text(freezer.proc, path, stat, sizeof(stat)) < 0)
        return true; /* or gone: nothing to move */
    const char *after = strrchr(stat, ')'); /* ") S PPID" */
    return after && strlen(after) > 4 && strtol(after + 4, NULL, 10) == 2;
}

/* Move what is in the root cgroup; how many have moved. */
static int move_once(void)
{
    int fd = openat(freezer.cgroups, "cgroup.procs", O_RDONLY | O_CLOEXEC);
    FILE *list = fd < 0 ? NULL : fdopen(fd, "r");
    char line[32];
    int moved = 0;
    if (!list) {
        if (fd >= 0)
            close(fd);
        return 0;
    }
    while (fgets(line, sizeof(line), list)) {
        long pid = strtol(line, NULL, 10);
        if (pid > 1 && !is_kernel_thread(pid) &&
            write_text(freezer.cgroups, HOME "/cgroup.procs", line) == 0)
            moved++;
    }
    fclose(list);
    return moved;
}

/* Who forks meanwhile is caught by the next round. */
static void move_all(void)
{
    for (int round = 0; round < ROUNDS_MAX && move_once() > 0; round++)
        ;
}

static void freeze_group(const char *name)
{
    char path[NAME_MAX + 20], now[8];
    snprintf(path, sizeof(path), "%s/cgroup.freeze", name);
    if (freezer.held_count == GROUPS_MAX ||
        read_text(freezer.cgroups, path, now, sizeof(now)) < 0 || now[0] != '0')
        return;
    int fd = openat(freezer.cgroups, path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "1", 1) == 1)
        freezer.held[freezer.held_count++] = fd;
    else if (fd >= 0)
        close(fd);
}

static void each_group(void (*fn)(const char *name))
{
    int fd = openat(freezer.cgroups, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (struct dirent *e; (e = readdir(dir));)
        if (e->d_type == DT_DIR && e->d_name[0] != '.')
            fn(e->d_name);
    closedir(dir);
}

static uint64_t deadline_ns;
static bool all_frozen;

/* cgroup.events tells of a change by POLLPRI. */
static void await_group(const char *name)
{
    char path[NAME_MAX + 20], text[128];
    snprintf(path, sizeof(path), "%s/cgroup.events", name);
    int fd = openat(freezer.cgroups, path, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && all_frozen) {
        ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
        text[n < 0 ? 0 : n] = 0;
        if (strstr(text, "frozen 1"))
            break;
        uint64_t now = sm_now_ns();
        struct pollfd p = { .fd = fd, .events = POLLPRI };
        if (now >= deadline_ns)
            all_frozen = false;
        else
            poll(&p, 1, (int)((deadline_ns - now) / 1000000) + 1);
    }
    if (fd >= 0)
        close(fd);
}

void sm_thaw(void)
{
    while (freezer.held_count) {
        int fd = freezer.held[--freezer.held_count];
        ssize_t n = write(fd, "0", 1);
        (void)n; /* a cgroup that is gone has nobody in it */
        close(fd);
    }
}

int sm_freeze(void)
{
    if (freezer.cgroups < 0 || freezer.proc < 0)
        return -EOPNOTSUPP;
    if (freezer.held_count)
        return -EALREADY;
    if (mkdirat(freezer.cgroups, HOME, 0755) < 0 && errno != EEXIST)
        return -errno;
    move_all();
    each_group(freeze_group);
    move_all(); /* and by those that went on until now */
    deadline_ns = sm_now_ns() + WAIT_MS * 1000000ull;
    all_frozen = true;
    each_group(await_group);
    if (!all_frozen) {
        sm_thaw();
        return -ETIMEDOUT;
    }
    return 0;
}
