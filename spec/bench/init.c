/* SPDX-License-Identifier: Apache-2.0 */
/* The smallest init: say when the kernel got here, by its own clock, and
 * restart the machine, which both VMMs take as the end. */
#include <stdio.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

int main(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    printf("init at %lld us\n", (long long)ts.tv_sec * 1000000 + ts.tv_nsec / 1000);
    fflush(stdout);
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}
