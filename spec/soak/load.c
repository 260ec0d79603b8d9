/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Work for a guest that is saved and restored while it does it, each kind a process of
 * its own: vector registers that must hold what was put into them, a timer of 1 kHz on a
 * clock that must not go back, signals of which none may be lost. Every process tells
 * how far it is in /dev/shm/spin.NAME ("NONCE COUNT"), replaced whole; what is wrong is
 * a line in /dev/shm/bad, and the end of that process.
 *
 *   load NONCE [HZ]
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static const char *nonce;

static void put(const char *path, int flags, const char *fmt, ...)
{
    char line[200];
    int fd = open(path, O_WRONLY | O_CREAT | flags, 0644), n;
    va_list ap;

    va_start(ap, fmt);
    n = vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    if (fd < 0 || write(fd, line, (size_t)n) != n)
        exit(1);
    close(fd);
}

static void say(const char *name, uint64_t count)
{
    char hidden[64], shown[64];

    snprintf(hidden, sizeof(hidden), "/dev/shm/.%s", name);
    snprintf(shown, sizeof(shown), "/dev/shm/spin.%s", name);
    put(hidden, O_TRUNC, "%s %llu\n", nonce, (unsigned long long)count);
    rename(hidden, shown);
}

static void bad(const char *what)
{
    put("/dev/shm/bad", O_APPEND, "%s\n", what);
    exit(1);
}

#if defined(__x86_64__)
/* All sixteen registers and the rounding mode, over a stretch of work that leaves them
 * alone: only an interrupted, saved or restored vCPU could change them. */
static void vectors(unsigned hz)
{
    static uint64_t in[32] __attribute__((aligned(16))), out[32] __attribute__((aligned(16)));
    uint32_t mode, want = 0x1f80 | 3u << 13; /* towards zero */

    (void)hz;
    for (uint64_t n = 1;; n++) {
        for (unsigned i = 0; i < 32; i++)
            in[i] = n * 0x9e3779b97f4a7c15ull + i;
        __asm__ volatile("ldmxcsr %[want]\n"
                         "movdqa 0(%[in]), %%xmm0\n movdqa 16(%[in]), %%xmm1\n"
                         "movdqa 32(%[in]), %%xmm2\n movdqa 48(%[in]), %%xmm3\n"
                         "movdqa 64(%[in]), %%xmm4\n movdqa 80(%[in]), %%xmm5\n"
                         "movdqa 96(%[in]), %%xmm6\n movdqa 112(%[in]), %%xmm7\n"
                         "movdqa 128(%[in]), %%xmm8\n movdqa 144(%[in]), %%xmm9\n"
                         "movdqa 160(%[in]), %%xmm10\n movdqa 176(%[in]), %%xmm11\n"
                         "movdqa 192(%[in]), %%xmm12\n movdqa 208(%[in]), %%xmm13\n"
                         "movdqa 224(%[in]), %%xmm14\n movdqa 240(%[in]), %%xmm15\n"
                         "mov $2000000, %%ecx\n1: dec %%ecx\n jnz 1b\n"
                         "movdqa %%xmm0, 0(%[out])\n movdqa %%xmm1, 16(%[out])\n"
                         "movdqa %%xmm2, 32(%[out])\n movdqa %%xmm3, 48(%[out])\n"
                         "movdqa %%xmm4, 64(%[out])\n movdqa %%xmm5, 80(%[out])\n"
                         "movdqa %%xmm6, 96(%[out])\n movdqa %%xmm7, 112(%[out])\n"
                         "movdqa %%xmm8, 128(%[out])\n movdqa %%xmm9, 144(%[out])\n"
                         "movdqa %%xmm10, 160(%[out])\n movdqa %%xmm11, 176(%[out])\n"
                         "movdqa %%xmm12, 192(%[out])\n movdqa %%xmm13, 208(%[out])\n"
                         "movdqa %%xmm14, 224(%[out])\n movdqa %%xmm15, 240(%[out])\n"
                         "stmxcsr %[mode]\n"
                         : [mode] "=m"(mode)
                         : [in] "r"(in), [out] "r"(out), [want] "m"(want)
                         : "ecx", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",
                           "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        if (memcmp(in, out, sizeof(in)) != 0)
            bad("a vector register has changed");
        if (mode != want)
            bad("the rounding mode has changed");
        say("vectors", n);
    }
}
#else
static void vectors(unsigned hz)
{
    (void)hz;
    for (uint64_t n = 1;; n++, usleep(10000))
        say("vectors", n);
}
#endif

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* No expiry early, none too many: a storm after a restore would be both. */
static void timer(unsigned hz)
{
    uint64_t period = 1000000000u / hz, began, before = 0, fired = 0, n;
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    struct itimerspec every = { { 0, (long)period }, { 0, (long)period } };

    began = now_ns();
    if (fd < 0 || timerfd_settime(fd, 0, &every, NULL) < 0)
        bad("no timer");
    for (uint64_t round = 1;; round++) {
        uint64_t now;

        if (read(fd, &n, sizeof(n)) != sizeof(n))
            bad("a timer cannot be read");
        now = now_ns();
        fired += n;
        if (now < before)
            bad("the monotonic clock went back");
        before = now;
        if (fired * period > now - began)
            bad("a timer fired early");
        if (round % 100 == 0)
            say("khz", fired);
    }
}

static volatile sig_atomic_t ticks;
static volatile uint64_t taken;

static void on_tick(int sig)
{
    (void)sig;
    ticks++;
}

static void on_user(int sig)
{
    (void)sig;
    taken++;
}

/* As many are taken as were sent, while a timer's signals interrupt both. */
static void signals(unsigned hz)
{
    struct itimerval every = { { 0, 1000000 / (long)hz }, { 0, 1000000 / (long)hz } };
    uint64_t sent = 0;

    signal(SIGALRM, on_tick);
    signal(SIGUSR1, on_user);
    setitimer(ITIMER_REAL, &every, NULL);
    for (;;) {
        sig_atomic_t before = ticks;

        for (unsigned i = 0; i < 500; i++) {
            raise(SIGUSR1);
            sent++;
        }
        if (taken != sent)
            bad("a signal was lost");
        while (ticks == before)
            pause();
        say("signals", taken);
    }
}

int main(int argc, char **argv)
{
    void (*const works[])(unsigned) = { vectors, timer, signals };
    int hz = argc > 2 ? atoi(argv[2]) : 1000;

    if (argc < 2 || hz < 1)
        return 2;
    nonce = argv[1];
    for (unsigned i = 0; i < sizeof(works) / sizeof(works[0]); i++) {
        pid_t pid = fork();

        if (pid < 0)
            return 1;
        if (pid == 0) {
            setsid();
            works[i]((unsigned)hz);
        }
    }
    return 0;
}
