/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a system needs besides files: host name, loopback, the three files of
 * /etc that name resolution reads, mounts asked for, clock and entropy. An
 * image's own files stay unless the host asks or they are missing or empty
 * (image builders leave empty ones behind).
 */
#include "agent.h"
#include "kabi.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DISK_WAIT_MS 10000

static void write_file(const char *path, const char *text)
{
    struct stat st;
    /* A link into a service's folder, as resolv.conf often is, would dangle. */
    if (lstat(path, &st) == 0 && S_ISLNK(st.st_mode))
        unlink(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0)
        return;
    size_t len = strlen(text);
    if (write(fd, text, len) != (ssize_t)len)
        unlink(path);
    close(fd);
}

static bool missing(const char *path)
{
    struct stat st;
    return stat(path, &st) < 0 || (S_ISREG(st.st_mode) && st.st_size == 0);
}

static void loopback_up(void)
{
    struct ifreq r = { .ifr_name = "lo" };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    if (ioctl(fd, SIOCGIFFLAGS, &r) == 0) {
        r.ifr_flags |= IFF_UP;
        ioctl(fd, SIOCSIFFLAGS, &r);
    }
    close(fd);
}

static void set_hostname(const char *asked)
{
    char name[65] = "";
    if (asked) {
        strncpy(name, asked, sizeof(name) - 1);
    } else {
        int fd = open("/etc/hostname", O_RDONLY | O_CLOEXEC);
        ssize_t n = fd >= 0 ? read(fd, name, sizeof(name) - 1) : 0;
        if (fd >= 0)
            close(fd);
        name[n > 0 ? n : 0] = 0;
        name[strcspn(name, " \t\r\n")] = 0;
    }
    if (!name[0])
        strcpy(name, "sm");
    sethostname(name, strlen(name));
    if (asked || missing("/etc/hostname")) {
        char line[80];
        snprintf(line, sizeof(line), "%s\n", name);
        write_file("/etc/hostname", line);
    }
}

static void write_hosts(const struct sm_boot_req *req)
{
    char name[65] = "sm", text[400];
    if (!req->hosts && !req->hostname && !missing("/etc/hosts"))
        return;
    gethostname(name, sizeof(name) - 1);
    snprintf(text, sizeof(text),
             "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
             "127.0.1.1\t%s\n",
             name);
    write_file("/etc/hosts", req->hosts ? req->hosts : text);
}

/* As container engines set them: low ports and ping need no root. And no compaction of
 * memory ahead of need, which wakes an idle guest twice a second. */
static void set_sysctls(void)
{
    static const char *const all[][2] = {
        { "/proc/sys/net/ipv4/ip_unprivileged_port_start", "0" },
        { "/proc/sys/net/ipv4/ping_group_range", "0 2147483647" },
        { "/proc/sys/vm/compaction_proactiveness", "0" },
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        int fd = open(all[i][0], O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (write(fd, all[i][1], strlen(all[i][1])) < 0)
            errno = 0; /* an older kernel; nothing depends on it */
        close(fd);
    }
}

void sm_setup_system(const struct sm_boot_req *req)
{
    loopback_up();
    set_sysctls();
    if (req->root == SM_ROOT_INITRAMFS)
        mkdir("/etc", 0755);
    set_hostname(req->hostname);
    write_hosts(req);
    if (req->resolv)
        write_file("/etc/resolv.conf", req->resolv);
    struct stat st;
    if (lstat("/etc/mtab", &st) < 0 && symlink("/proc/mounts", "/etc/mtab") < 0)
        return; /* a convenience */
}

/* Names of a copied machine. A read-only root keeps the old files; the kernel's
 * host name is new in any case. */
void sm_setup_identity(const struct sm_boot_req *req)
{
    if (req->hostname)
        set_hostname(req->hostname);
    if (req->hosts)
        write_file("/etc/hosts", req->hosts);
    if (req->resolv)
        write_file("/etc/resolv.conf", req->resolv);
    struct stat st;
    if (req->machine_id && stat("/etc/machine-id", &st) == 0 && st.st_size > 0) {
        char line[40];
        snprintf(line, sizeof(line), "%s\n", req->machine_id);
        write_file("/etc/machine-id", line);
    }
}

/* Split "ro,size=1m" into mount flags and what the file system shall read. */
static unsigned long mount_flags(char *options, char *data, size_t size)
{
    static const struct {
        const char *name;
        unsigned long flag;
    } known[] = { { "ro", MS_RDONLY },      { "rw", 0 },
                  { "nosuid", MS_NOSUID },  { "nodev", MS_NODEV },
                  { "noexec", MS_NOEXEC },  { "noatime", MS_NOATIME },
                  { "bind", MS_BIND },      { "rbind", MS_BIND | MS_REC },
                  { "relatime", MS_RELATIME } };
    unsigned long flags = 0;
    char *save = NULL;
    data[0] = 0;
    for (char *o = strtok_r(options, ",", &save); o; o = strtok_r(NULL, ",", &save)) {
        size_t i = 0, count = sizeof(known) / sizeof(known[0]);
        while (i < count && strcmp(o, known[i].name))
            i++;
        if (i < count) {
            flags |= known[i].flag;
        } else if (strlen(data) + strlen(o) + 2 <= size) {
            if (data[0])
                strcat(data, ",");
            strcat(data, o);
        }
    }
    return flags;
}

static int mount_one(const struct sm_mount_req *m)
{
    char disk[64], data[1024];
    const char *source = m->source;
    if (!strncmp(source, "serial:", 7)) {
        int rc = sm_disk_by_serial(source + 7, DISK_WAIT_MS, disk, sizeof(disk));
        if (rc)
            return rc;
        source = disk;
    }
    unsigned long flags = mount_flags(m->options, data, sizeof(data));
    int rc = sm_make_folders(m->target, 0755, true);
    if (rc)
        return rc;
    if (mount(source, m->target, m->type, flags, data) < 0)
        return -errno;
    /* A bind takes its other flags only when mounted again. */
    if (flags & MS_BIND && flags & ~(unsigned long)(MS_BIND | MS_REC) &&
        mount(NULL, m->target, NULL, flags | MS_REMOUNT, NULL) < 0)
        return -errno;
    return 0;
}

int sm_setup_mounts(const struct sm_boot_req *req, const char **what)
{
    for (unsigned i = 0; i < req->mount_count; i++) {
        int rc = mount_one(&req->mounts[i]);
        if (rc) {
            *what = req->mounts[i].target;
            return rc;
        }
    }
    return 0;
}

void sm_setup_clock(uint64_t realtime_ns)
{
    struct timespec t = { .tv_sec = (time_t)(realtime_ns / 1000000000u),
                          .tv_nsec = (long)(realtime_ns % 1000000000u) };
    clock_settime(CLOCK_REALTIME, &t);
}

void sm_setup_entropy(const uint8_t *bytes, uint32_t len)
{
    struct {
        int bits, size;
        uint8_t data[4096];
    } pool;
    if (len == 0 || len > sizeof(pool.data))
        return;
    pool.bits = (int)len * 8;
    pool.size = (int)len;
    memcpy(pool.data, bytes, len);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    ioctl(fd, KABI_RNDADDENTROPY, &pool);
    ioctl(fd, KABI_RNDRESEEDCRNG, 0);
    close(fd);
}
