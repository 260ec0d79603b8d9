/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the initramfs to the image's root, and back at the end.
 *
 *   /.sm/lower    EROFS, read-only: the disk with serial "rootfs", or the pmem
 *                 segment, whose pages programs then map as they are (DAX)
 *   /.sm/upper    the disk "scratch" (ext4) or a tmpfs: upper/ and work/
 *   /.sm/root     overlay of the two; moved over / and entered by chroot
 *
 * Also a read-only root is an overlay, with an upper layer of a few folders
 * that is sealed afterwards: an image of one static binary has no /proc to
 * mount on. Disks are known by their serial; one that is not there yet is
 * awaited by the kernel's uevents, not by sleeping.
 */
#include "agent.h"
#include "kabi.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define LOWER "/.sm/lower"
#define UPPER "/.sm/upper"
#define ROOT "/.sm/root"
#define ROOT_WAIT_MS 10000

static int uevent_open(void)
{
    struct kabi_sockaddr_nl addr = { .family = KABI_AF_NETLINK, .groups = 1 };
    int fd = socket(KABI_AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
                    KABI_NETLINK_KOBJECT_UEVENT);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static bool has_serial(const char *disk, const char *serial)
{
    char path[300], text[64];
    snprintf(path, sizeof(path), "/sys/block/%s/serial", disk);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof(text) - 1);
    close(fd);
    if (n < 0)
        return false;
    text[n] = 0;
    text[strcspn(text, "\r\n")] = 0;
    return !strcmp(text, serial);
}

/* A pmem segment has no serial; the one there is, is the root. */
static bool is_disk(const char *disk, const char *serial)
{
    if (!strncmp(disk, "pmem", 4))
        return !strcmp(serial, "rootfs");
    return !strncmp(disk, "vd", 2) && has_serial(disk, serial);
}

static int find_disk(const char *serial, char *out, size_t size)
{
    int rc = -ENOENT;
    DIR *dir = opendir("/sys/block");
    if (!dir)
        return -errno;
    struct dirent *e;
    while (rc && (e = readdir(dir)))
        if (is_disk(e->d_name, serial)) {
            snprintf(out, size, "/dev/%s", e->d_name);
            /* devtmpfs makes the node before sysfs tells of the disk. */
            rc = access(out, F_OK) < 0 ? -errno : 0;
        }
    closedir(dir);
    return rc;
}

int sm_disk_by_serial(const char *serial, int timeout_ms, char *out, size_t size)
{
    /* Listen first, look second: what comes in between is not missed. */
    int events = timeout_ms > 0 ? uevent_open() : -1;
    uint64_t deadline = sm_now_ns() + (uint64_t)timeout_ms * 1000000u;
    int rc;
    while ((rc = find_disk(serial, out, size)) != 0 && timeout_ms > 0) {
        uint64_t now = sm_now_ns();
        if (now >= deadline) {
            rc = -ETIMEDOUT;
            break;
        }
        struct pollfd p = { .fd = events, .events = POLLIN };
        int left_ms = (int)((deadline - now) / 1000000u) + 1;
        /* Without the socket (no CONFIG_NET): look again every 10 ms. */
        poll(&p, 1, events < 0 && left_ms > 10 ? 10 : left_ms);
        char message[4096];
        while (events >= 0 && read(events, message, sizeof(message)) > 0)
            ;
    }
    if (events >= 0)
        close(events);
    return rc;
}

int sm_root_lower(struct sm_agent *a, int timeout_ms)
{
    char disk[64];
    if (a->lower)
        return 0;
    int rc = sm_disk_by_serial("rootfs", timeout_ms, disk, sizeof(disk));
    if (rc)
        return rc;
    mkdir("/.sm", 0755);
    mkdir(LOWER, 0755);
    if (mount(disk, LOWER, "erofs", MS_RDONLY,
              strncmp(disk, "/dev/pmem", 9) ? NULL : "dax=always") < 0)
        return -errno;
    a->lower = true;
    return 0;
}

/* The overlay's root folder looks like its upper layer's: copy the image's. */
static int make_layers(void)
{
    struct stat st;
    if ((mkdir(UPPER "/upper", 0755) < 0 || mkdir(UPPER "/work", 0755) < 0) &&
        errno != EEXIST)
        return -errno;
    if (stat(LOWER, &st) == 0 && (chown(UPPER "/upper", st.st_uid, st.st_gid) < 0 ||
                                  chmod(UPPER "/upper", st.st_mode & 07777) < 0))
        return -errno;
    return 0;
}

static int mount_upper(struct sm_agent *a, uint32_t mode)
{
    char disk[64];
    mkdir(UPPER, 0755);
    int rc = -ENOENT;
    if (mode == SM_ROOT_AUTO || mode == SM_ROOT_SCRATCH)
        rc = sm_disk_by_serial("scratch", mode == SM_ROOT_SCRATCH ? ROOT_WAIT_MS : 0, disk,
                               sizeof(disk));
    if (rc == 0) {
        if (mount(disk, UPPER, "ext4", MS_NOATIME, NULL) < 0)
            return -errno;
        a->scratch = true;
    } else if (mode == SM_ROOT_SCRATCH) {
        return rc;
    } else if (mount("tmpfs", UPPER, "tmpfs", 0,
                     mode == SM_ROOT_READONLY ? "mode=755,size=1m" : "mode=755") < 0) {
        return -errno;
    }
    return make_layers();
}

/* Make the folder if the image lacks it; its mode is the image's business. */
static void want_folder(const char *path, mode_t mode)
{
    if (mkdir(path, mode) == 0)
        chmod(path, mode);
}

static int carry_mount(const char *from, const char *to)
{
    want_folder(to, 0755);
    return mount(from, to, NULL, MS_MOVE, NULL) < 0 ? -errno : 0;
}

/* Remove the initramfs's files (they are memory), never crossing a mount. */
static void empty_folder(int parent, const char *name, dev_t dev)
{
    struct stat st;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return;
    DIR *dir = fstat(fd, &st) == 0 && st.st_dev == dev ? fdopendir(fd) : NULL;
    if (!dir) {
        close(fd);
        return;
    }
    struct dirent *e;
    while ((e = readdir(dir))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") || !strcmp(e->d_name, ".sm"))
            continue;
        if (unlinkat(fd, e->d_name, 0) < 0 && errno == EISDIR) {
            empty_folder(fd, e->d_name, dev);
            unlinkat(fd, e->d_name, AT_REMOVEDIR);
        }
    }
    closedir(dir);
}

static int enter_root(struct sm_agent *a)
{
    struct stat st;
    a->old_root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (a->old_root < 0 || fstat(a->old_root, &st) < 0)
        return -errno;
    int rc = carry_mount("/dev", ROOT "/dev");
    if (rc == 0)
        rc = carry_mount("/proc", ROOT "/proc");
    if (rc == 0)
        rc = carry_mount("/sys", ROOT "/sys");
    if (rc)
        return rc;
    empty_folder(a->old_root, ".", st.st_dev);
    if (chdir(ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 ||
        chdir("/") < 0)
        return -errno;
    return 0;
}

/* A writable copy-on-write view of a folder of a read-only root, in memory. */
static int loosen(const char *dir, const char *name)
{
    char base[64], options[256];
    want_folder(dir, strcmp(name, "tmp") ? 0755 : 01777);
    snprintf(base, sizeof(base), "/dev/shm/.%s", name);
    struct stat st;
    if (stat(dir, &st) < 0)
        return -errno;
    /* The layers live in a tmpfs that only the overlay keeps alive. */
    mkdir(base, 0700);
    if (mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755") < 0)
        return -errno;
    char upper[80], work[80];
    snprintf(upper, sizeof(upper), "%s/upper", base);
    snprintf(work, sizeof(work), "%s/work", base);
    mkdir(upper, 0755);
    mkdir(work, 0755);
    if (chown(upper, st.st_uid, st.st_gid) < 0 || chmod(upper, st.st_mode & 07777) < 0)
        return -errno;
    snprintf(options, sizeof(options), "lowerdir=%s,upperdir=%s,workdir=%s", dir, upper, work);
    int rc = mount("overlay", dir, "overlay", MS_NOSUID | MS_NODEV, options) < 0 ? -errno : 0;
    umount2(base, MNT_DETACH);
    rmdir(base);
    return rc;
}

static int mount_rest(uint32_t mode)
{
    want_folder("/dev/pts", 0755);
    want_folder("/dev/shm", 01777);
    if (mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
              "gid=5,mode=620,ptmxmode=666") < 0 ||
        mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777") < 0)
        return -errno;
    /* Not every kernel has it, and little needs it. */
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC,
          "nsdelegate");
    if (symlink("/proc/self/fd", "/dev/fd") < 0 || symlink("/proc/self/fd/0", "/dev/stdin") < 0 ||
        symlink("/proc/self/fd/1", "/dev/stdout") < 0 ||
        symlink("/proc/self/fd/2", "/dev/stderr") < 0)
        return errno == EEXIST ? 0 : -errno;
    if (mode == SM_ROOT_INITRAMFS)
        return 0;
    want_folder("/etc", 0755);
    if (mode == SM_ROOT_READONLY) {
        int rc = loosen("/run", "run");
        return rc ? rc : loosen("/tmp", "tmp");
    }
    /* /run is not covered by a tmpfs: images keep folders of services in it. */
    want_folder("/run", 0755);
    want_folder("/tmp", 01777);
    return 0;
}

int sm_root_switch(struct sm_agent *a, const struct sm_boot_req *req, uint32_t *stage,
                   const char **what)
{
    *stage = SM_STAGE_ROOT;
    if (req->root != SM_ROOT_INITRAMFS) {
        *what = "root disk";
        int rc = sm_root_lower(a, ROOT_WAIT_MS);
        if (rc)
            return rc;
        *stage = SM_STAGE_SCRATCH;
        *what = "writable layer";
        rc = mount_upper(a, req->root);
        if (rc)
            return rc;
        a->discard = req->flags & SM_BOOTF_DISCARD;
        *stage = SM_STAGE_ROOT;
        *what = "overlay";
        mkdir(ROOT, 0755);
        if (mount("overlay", ROOT, "overlay", MS_NOATIME,
                  a->scratch && a->discard ? "lowerdir=" LOWER ",upperdir=" UPPER
                                             "/upper,workdir=" UPPER "/work,volatile"
                                           : "lowerdir=" LOWER ",upperdir=" UPPER
                                             "/upper,workdir=" UPPER "/work") < 0)
            return -errno;
        *what = "switch root";
        rc = enter_root(a);
        if (rc)
            return rc;
    }
    *what = "device folders";
    return mount_rest(req->root);
}

int sm_root_seal(void)
{
    return mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) < 0 ? -errno : 0;
}

/*
 * No process is left. The overlay is the mount on top of the initramfs's own
 * root folder: seen from there, `.` names it to umount.
 */
void sm_root_leave(struct sm_agent *a)
{
    if (a->scratch && a->discard)
        return;
    sync();
    if (a->old_root < 0 || fchdir(a->old_root) < 0 || chroot(".") < 0)
        return;
    umount2(".", MNT_DETACH);
    if (a->scratch && umount2(UPPER, 0) < 0) {
        sm_log(a, "scratch disk: %s", strerror(errno));
        mount(NULL, UPPER, NULL, MS_REMOUNT | MS_RDONLY, NULL);
    }
    sync();
}
