/* SPDX-License-Identifier: Apache-2.0 */
/* The smallest init: say when the kernel got here, by its own clock, and
 * restart the machine, which both VMMs take as the end. With "stay" on the
 * kernel's command line it stays instead, and says a letter every millisecond. */
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    printf("init at %lld us\n", (long long)ts.tv_sec * 1000000 + ts.tv_nsec / 1000);
    fflush(stdout);
    while (argc > 1 && !strcmp(argv[1], "stay")) {
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
        if (write(1, "t", 1) < 0)
            break;
    }
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}
