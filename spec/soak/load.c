/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Work for a guest that is saved and restored while it does it, each kind a process of
 * its own: CPUs that count, a file that must read back from the disk as it was written,
 * vector registers that must hold what was put into them, a timer of 1 kHz on a clock
 * that must not go back, signals of which none may be lost. All are niced, so that
 * whoever checks goes first.
 *
 *   load start CPUS [HZ]   returns when every worker has been through its work once
 *   load check             waits until every worker has been through it once more;
 *                          prints the nonce, which each has in its own memory alone
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define BOARD "/dev/shm/load"
#define FILE_AT "/root/load.data"
#define WORKERS 32
#define PATIENCE_S 200 /* without news from anyone */
#define BLOCK (32 << 10)
#define REST_US 50000
#define FUTEX_WAIT 0 /* linux/futex.h, which musl's compiler does not see */
#define FUTEX_WAKE 1

/* What the workers tell whoever checks. */
struct board {
    _Atomic uint32_t news; /* a futex: counts what was told to one who waits */
    uint32_t workers, cpus;
    char bad[200]; /* what has gone wrong: the first */
    struct slot {
        char name[16];
        _Atomic uint64_t told; /* 0: to be told */
        _Atomic uint64_t rounds;
    } slots[WORKERS];
};

static struct board *board;
static struct slot *mine;
static uint64_t nonce;

static void pin(unsigned cpu)
{
    cpu_set_t one;

    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
}

static void tell(void)
{
    atomic_fetch_add(&mine->rounds, 1);
    if (atomic_exchange(&mine->told, nonce) == 0) {
        atomic_fetch_add(&board->news, 1);
        syscall(SYS_futex, &board->news, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
}

/* For those that keep a CPU busy: all on the same one, which changes each second, so that
 * every CPU has its turn and whoever saves and checks does not wait for many of them. */
static void turn(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    pin((unsigned)((uint64_t)t.tv_sec % board->cpus));
}

static void bad(const char *what)
{
    if (!board->bad[0])
        snprintf(board->bad, sizeof(board->bad), "%s: %s (round %llu)", mine->name, what,
                 (unsigned long long)mine->rounds);
    atomic_fetch_add(&board->news, 1);
    syscall(SYS_futex, &board->news, FUTEX_WAKE, 1, NULL, NULL, 0);
    exit(1);
}

/* One for each CPU, short work and a longer rest: they are caught running, halted and on
 * their way. */
static void spin(unsigned hz)
{
    (void)hz;
    pin((unsigned)(mine - board->slots));
    for (;; usleep(REST_US)) {
        for (volatile unsigned i = 0; i < 50000; i++)
            ;
        tell();
    }
}

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15ull;
    return x ^ x >> 29;
}

/* What the last round wrote is read, from the disk and not from memory, and replaced. */
static void disk(unsigned hz)
{
    static uint64_t block[BLOCK / sizeof(uint64_t)] __attribute__((aligned(4096)));
    int fd = open(FILE_AT, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);

    (void)hz;
    if (fd < 0)
        bad("no file");
    for (uint64_t round = 0;; round++) {
        if (round > 0) {
            if (pread(fd, block, BLOCK, 0) != BLOCK)
                bad("a file cannot be read");
            for (unsigned i = 0; i < BLOCK / sizeof(uint64_t); i++) {
                if (block[i] != mix(nonce + (round - 1) * BLOCK + i))
                    bad("a file did not read back");
            }
        }
        for (unsigned i = 0; i < BLOCK / sizeof(uint64_t); i++)
            block[i] = mix(nonce + round * BLOCK + i);
        if (pwrite(fd, block, BLOCK, 0) != BLOCK || fdatasync(fd) < 0)
            bad("a file cannot be written");
        if (round > 0)
            tell();
        turn();
        usleep(REST_US);
    }
}

#if defined(__x86_64__)
/* All sixteen registers and the rounding mode, over a stretch of work that leaves them
 * alone: only an interrupted, saved or restored vCPU could change them. Never rests. */
static void vectors(unsigned hz)
{
    static uint64_t in[32] __attribute__((aligned(16))),
        out[32] __attribute__((aligned(16)));
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
                         "mov $1000000, %%ecx\n1: dec %%ecx\n jnz 1b\n"
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
                         : "ecx", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
                           "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                           "xmm12", "xmm13", "xmm14", "xmm15");
        if (memcmp(in, out, sizeof(in)) != 0)
            bad("a vector register has changed");
        if (mode != want)
            bad("the rounding mode has changed");
        tell();
        turn();
    }
}
#else
static void vectors(unsigned hz)
{
    (void)hz;
    for (;; usleep(REST_US))
        tell();
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
        if (round % 100 == 0) {
            tell();
            turn();
        }
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
    long period =
        10 * 1000000 / (long)hz; /* every ms would keep a vCPU busy, as `timer` does */
    struct itimerval every = { { period / 1000000, period % 1000000 },
                               { period / 1000000, period % 1000000 } };
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
        tell();
        turn();
    }
}

static int check(void)
{
    struct timespec patience = { PATIENCE_S, 0 };

    for (unsigned i = 0; i < board->workers; i++)
        atomic_store(&board->slots[i].told, 0);
    for (unsigned i = 0; i < board->workers;) {
        uint32_t news = atomic_load(&board->news);
        struct slot *s = &board->slots[i];

        if (board->bad[0]) {
            fprintf(stderr, "%s\n", board->bad);
            return 1;
        }
        if (atomic_load(&s->told) != 0) {
            i++;
        } else if (syscall(SYS_futex, &board->news, FUTEX_WAIT, news, &patience, NULL,
                           0) < 0 &&
                   errno == ETIMEDOUT) {
            fprintf(stderr, "%s stands still at round %llu\n", s->name,
                    (unsigned long long)s->rounds);
            return 1;
        }
    }
    for (unsigned i = 0; i < board->workers; i++) {
        if (board->slots[i].told != board->slots[0].told) {
            fprintf(stderr, "%s has another nonce\n", board->slots[i].name);
            return 1;
        }
    }
    printf("%016llx\n", (unsigned long long)board->slots[0].told);
    return 0;
}

static int start(const char *name, unsigned k, void (*work)(unsigned), unsigned hz)
{
    pid_t pid;

    mine = &board->slots[board->workers];
    snprintf(mine->name, sizeof(mine->name), "%s %u", name, k);
    board->workers++;
    pid = fork();
    if (pid == 0) {
        int null = open("/dev/null", O_RDWR);

        setsid();
        for (int fd = 0; fd < 3; fd++)
            dup2(null, fd); /* whoever started us does not wait for us */
        work(hz);
    }
    return pid < 0;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*work)(unsigned);
    } works[] = { { "disk", disk },
                  { "vectors", vectors },
                  { "timer", timer },
                  { "signals", signals } };
    int starts = argc > 2 && strcmp(argv[1], "start") == 0;
    int cpus = starts ? atoi(argv[2]) : 0, hz = argc > 3 ? atoi(argv[3]) : 1000,
        failed = 0, fd;

    if (starts ? cpus < 1 || cpus > 16 || hz < 1
               : argc != 2 || strcmp(argv[1], "check") != 0)
        return 2;
    fd = open(BOARD, starts ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
    if (fd < 0 || (starts && ftruncate(fd, sizeof(*board)) < 0))
        return 1;
    board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (board == MAP_FAILED)
        return 1;
    if (!starts)
        return check();
    if (getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce) ||
        setpriority(PRIO_PROCESS, 0, 15) < 0)
        return 1;
    board->cpus = (uint32_t)cpus;
    for (int k = 0; k < cpus; k++)
        failed |= start("spinner", (unsigned)k + 1, spin, (unsigned)hz);
    for (unsigned i = 0; i < sizeof(works) / sizeof(works[0]); i++)
        failed |= start(works[i].name, 1, works[i].work, (unsigned)hz);
    return failed || check();
}
