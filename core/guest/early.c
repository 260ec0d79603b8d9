/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first milliseconds of a machine: the kernel's file systems, a place to
 * log, and the drivers a stock kernel keeps in modules. /modules/order lists
 * them in the order they need, one path a line (relative to /modules unless
 * absolute), module parameters after a space.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int mount_at(const char *type, const char *target, unsigned long flags,
                    const char *options)
{
    mkdir(target, 0755);
    if (mount(type, target, type, flags, options) < 0 && errno != EBUSY)
        return -errno;
    return 0;
}

int sm_early_mounts(struct sm_agent *a)
{
    int rc = mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=755");
    /* The kernel opened /dev/console for us only if the initramfs has it. */
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0)
            break;
    a->log = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    int rc2 = mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    int rc3 = mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    return rc ? rc : rc2 ? rc2 : rc3;
}

static void load(struct sm_agent *a, char *line)
{
    char path[544];
    char *options = strchr(line, ' ');
    if (options)
        *options++ = 0;
    snprintf(path, sizeof(path), "%s%s", line[0] == '/' ? "" : "/modules/", line);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, options ? options : "", 0) < 0 &&
                   errno != EEXIST))
        sm_log(a, "module %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

/* Absent list: a kernel with everything built in. */
int sm_early_modules(struct sm_agent *a)
{
    FILE *list = fopen("/modules/order", "re");
    char line[512];
    if (!list)
        return 0;
    while (fgets(line, sizeof(line), list)) {
        line[strcspn(line, "\r\n")] = 0;
        if (line[0] && line[0] != '#')
            load(a, line);
    }
    fclose(list);
    return 0;
}
