/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Confinement of a worker; see confine.h. The seccomp filter is written by
 * hand: a list of numbers compiled to classic BPF, one comparison each, the
 * calls of the dataplane first. Source: seccomp(2), landlock(7).
 */
#include "confine.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define AUDIT_ARCH_OURS AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define AUDIT_ARCH_OURS AUDIT_ARCH_AARCH64
#endif

/* Sanitizers open files, spawn helpers and read /proc at any time. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

#define MAX_DESCRIPTORS 4096 /* 1024 vsock streams and what a disk needs */
#define KVM_IOCTLS 0xae      /* KVMIO: the type of every ioctl of KVM */
#define VHOST_IOCTLS 0xaf    /* VHOST_VIRTIO */

#ifndef SECCOMP_RET_KILL_PROCESS
#define SECCOMP_RET_KILL_PROCESS 0x80000000u
#endif

/* Allowed whatever their arguments. */
static const int allowed[] = {
    __NR_read, __NR_write, __NR_futex, __NR_epoll_pwait, __NR_readv, __NR_writev,
    __NR_pread64, __NR_pwrite64, __NR_preadv, __NR_pwritev, __NR_preadv2, __NR_pwritev2,
    __NR_recvfrom, __NR_sendto, __NR_recvmsg, __NR_sendmsg, __NR_rt_sigtimedwait,
    __NR_clock_gettime, __NR_epoll_ctl, __NR_ppoll, __NR_madvise, __NR_fallocate,
    __NR_copy_file_range, __NR_fdatasync, __NR_fsync, __NR_sync_file_range, __NR_getrandom, __NR_munmap,
    __NR_mremap, __NR_brk, __NR_close, __NR_fstat, __NR_lseek, __NR_ftruncate,
    __NR_fcntl, __NR_dup, __NR_dup3, __NR_flock, __NR_connect, __NR_accept4,
    __NR_shutdown, __NR_getsockopt, __NR_setsockopt, __NR_getsockname, __NR_getpeername,
    __NR_eventfd2, __NR_epoll_create1, __NR_timerfd_create, __NR_timerfd_settime,
    __NR_pipe2, __NR_memfd_create, __NR_rt_sigaction, __NR_rt_sigprocmask,
    __NR_rt_sigreturn, __NR_sigaltstack, __NR_restart_syscall, __NR_nanosleep,
    __NR_clock_nanosleep, __NR_clock_getres, __NR_gettimeofday, __NR_getpid, __NR_gettid,
    __NR_tgkill, __NR_sched_yield, __NR_sched_getaffinity, __NR_getrusage,
    __NR_setitimer, __NR_set_robust_list, __NR_exit, __NR_exit_group,
#ifdef __NR_rseq
    __NR_rseq,
#endif
#ifdef __NR_membarrier
    __NR_membarrier,
#endif
#ifdef __NR_poll
    __NR_poll,
#endif
#ifdef __NR_epoll_wait
    __NR_epoll_wait,
#endif
#ifdef __NR_alarm
    __NR_alarm,
#endif
#ifdef __NR_accept
    __NR_accept,
#endif
};

/* No code of ours makes these; whoever does is not ours. */
static const int deadly[] = {
    __NR_execve, __NR_execveat, __NR_ptrace, __NR_process_vm_readv, __NR_process_vm_writev,
    __NR_mount, __NR_umount2, __NR_pivot_root, __NR_chroot, __NR_init_module,
    __NR_finit_module, __NR_kexec_load, __NR_bpf, __NR_keyctl, __NR_add_key, __NR_unshare,
    __NR_setns, __NR_setuid, __NR_setgid, __NR_setresuid, __NR_setresgid, __NR_reboot,
    __NR_perf_event_open, __NR_userfaultfd,
#ifdef __NR_fork
    __NR_fork, __NR_vfork,
#endif
};

/* ---- the filter ---- */

#define MAX_INSNS 512

struct program {
    struct sock_filter insns[MAX_INSNS];
    unsigned short len;
};

static void emit(struct program *p, uint16_t code, uint32_t k, uint8_t jt, uint8_t jf)
{
    if (p->len < MAX_INSNS) {
        p->insns[p->len] = (struct sock_filter){ code, jt, jf, k };
    }
    p->len++;
}

static void load(struct program *p, size_t offset)
{
    emit(p, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

static void answer(struct program *p, uint32_t action)
{
    emit(p, BPF_RET | BPF_K, action, 0, 0);
}

static void answer_if(struct program *p, int nr, uint32_t action)
{
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)nr, 0, 1);
    answer(p, action);
}

/* Little-endian: the low half of an argument comes first. */
static size_t arg_low(unsigned n)
{
    return offsetof(struct seccomp_data, args) + 8 * n;
}

/* nr is allowed when (argument & mask) == value, else EPERM. */
static void allow_if_arg(struct program *p, int nr, unsigned arg, uint32_t mask, uint32_t value)
{
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)nr, 0, 5);
    load(p, arg_low(arg));
    emit(p, BPF_ALU | BPF_AND | BPF_K, mask, 0, 0);
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
    answer(p, SECCOMP_RET_ALLOW);
    answer(p, SECCOMP_RET_ERRNO | EPERM);
}

/* Of a process that is there to make connections. */
static void build_network(struct program *p)
{
    static const int families[] = { AF_UNIX, AF_INET, AF_INET6 };
    answer_if(p, __NR_bind, SECCOMP_RET_ALLOW);
    answer_if(p, __NR_listen, SECCOMP_RET_ALLOW);
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, __NR_socket, 0, 2 + 2 * 3);
    load(p, arg_low(0));
    for (size_t i = 0; i < 3; i++) {
        answer_if(p, families[i], SECCOMP_RET_ALLOW);
    }
    answer(p, SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 0, 2 + 2 * 2);
    load(p, arg_low(1));
    answer_if(p, FIONREAD, SECCOMP_RET_ALLOW);
    answer_if(p, TUNSETOFFLOAD, SECCOMP_RET_ALLOW);
    answer(p, SECCOMP_RET_ERRNO | EPERM);
}

/* Of a worker: KVM's, vhost's, and two of a tap. */
static void build_machine(struct program *p)
{
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 0, 1 + 2 * 2 + 5);
    load(p, arg_low(1));
    answer_if(p, TUNSETOFFLOAD, SECCOMP_RET_ALLOW);
    answer_if(p, TUNSETQUEUE, SECCOMP_RET_ALLOW);
    emit(p, BPF_ALU | BPF_AND | BPF_K, 0xff00, 0, 0);
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, VHOST_IOCTLS << 8, 1, 0);
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, KVM_IOCTLS << 8, 0, 1);
    answer(p, SECCOMP_RET_ALLOW);
    answer(p, SECCOMP_RET_ERRNO | EPERM);
}

static void build(struct program *p, bool network)
{
    const uint32_t allow = SECCOMP_RET_ALLOW;
    load(p, offsetof(struct seccomp_data, arch));
    emit(p, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_OURS, 1, 0);
    answer(p, SECCOMP_RET_KILL_PROCESS);
    load(p, offsetof(struct seccomp_data, nr));
#if defined(__x86_64__)
    /* the x32 table: the same numbers, other meanings */
    emit(p, BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1);
    answer(p, SECCOMP_RET_KILL_PROCESS);
#endif
    if (network) {
        build_network(p);
    } else {
        build_machine(p);
    }
    for (size_t i = 0; i < sizeof(allowed) / sizeof(allowed[0]); i++) {
        answer_if(p, allowed[i], allow);
    }
    /* glibc's fstat, not its stat */
#ifdef __NR_newfstatat
    allow_if_arg(p, __NR_newfstatat, 3, 0x1000, 0x1000); /* AT_EMPTY_PATH */
#endif
    allow_if_arg(p, __NR_mmap, 2, PROT_EXEC, 0);
    allow_if_arg(p, __NR_mprotect, 2, PROT_EXEC, 0);
    allow_if_arg(p, __NR_socket, 0, ~0u, AF_UNIX);
    allow_if_arg(p, __NR_prctl, 0, ~0u, PR_SET_NAME);
    /* threads, not processes; clone3 hides its flags, so glibc is sent back */
    allow_if_arg(p, __NR_clone, 0, CLONE_VM | CLONE_THREAD, CLONE_VM | CLONE_THREAD);
#ifdef __NR_clone3
    answer_if(p, __NR_clone3, SECCOMP_RET_ERRNO | ENOSYS);
#endif
    for (size_t i = 0; i < sizeof(deadly) / sizeof(deadly[0]); i++) {
        answer_if(p, deadly[i], SECCOMP_RET_KILL_PROCESS);
    }
    answer(p, SECCOMP_RET_ERRNO | EPERM);
}

/* All threads at once; a positive result would be the thread that could not. */
static int apply_seccomp(struct sm_confinement *done, bool network)
{
    struct program p = { .len = 0 };
    build(&p, network);
    if (p.len > MAX_INSNS) {
        return -E2BIG;
    }
    struct sock_fprog prog = { .len = p.len, .filter = p.insns };
    long err = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &prog);
    if (err > 0) {
        return -ESRCH;
    }
    if (err < 0) {
        return errno == ENOSYS || errno == EINVAL ? 0 : -errno;
    }
    done->seccomp = true;
    return 0;
}

/* ---- landlock ---- */

#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#define __NR_landlock_restrict_self 446
#endif

/* Our own declaration: headers older than the running kernel lack fields. */
struct ruleset {
    uint64_t access_fs, access_net, scoped;
};

static int apply_landlock(struct sm_confinement *done, bool network)
{
    long abi = syscall(__NR_landlock_create_ruleset, NULL, 0, 1u /* VERSION */);
    if (abi < 1) {
        return 0;
    }
    /* rights on files known to ABI 1, 2, 3 and 5: 13, 14, 15 and 16 of them */
    unsigned rights = abi >= 5 ? 16 : abi >= 3 ? 15 : abi >= 2 ? 14 : 13;
    struct ruleset rules = {
        .access_fs = (1ull << rights) - 1,
        .access_net = abi >= 4 && !network ? 3 : 0, /* bind and connect of TCP */
        .scoped = abi >= 6 ? 3 : 0,     /* abstract unix sockets, signals */
    };
    size_t size = abi >= 6 ? 24 : abi >= 4 ? 16 : 8;
    int fd = (int)syscall(__NR_landlock_create_ruleset, &rules, size, 0u);
    if (fd < 0) {
        return -errno;
    }
    int err = syscall(__NR_landlock_restrict_self, fd, 0u) < 0 ? -errno : 0;
    close(fd);
    if (!err) {
        done->landlock = (int)abi;
    }
    return err;
}

/* ---- limits ---- */

static int lower(int resource, rlim_t most)
{
    struct rlimit limit;
    if (getrlimit(resource, &limit) < 0) {
        return -errno;
    }
    if (limit.rlim_max > most) {
        limit.rlim_max = most;
    }
    if (limit.rlim_cur > limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
    }
    return setrlimit(resource, &limit) < 0 ? -errno : 0;
}

static int apply_limits(struct sm_confinement *done)
{
    int err = lower(RLIMIT_CORE, 0);
    if (!err) {
        err = lower(RLIMIT_MEMLOCK, 0);
    }
    if (!err) {
        err = lower(RLIMIT_NOFILE, MAX_DESCRIPTORS);
    }
    done->limits = !err;
    return err;
}

static int confine(struct sm_confinement *done, bool network, bool files)
{
    *done = (struct sm_confinement){ 0 };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
        return -errno;
    }
    done->no_new_privs = true;
    int err = apply_limits(done);
    if (!err && !SANITIZED && !files) {
        err = apply_landlock(done, network);
    }
    if (!err && !SANITIZED) {
        err = apply_seccomp(done, network);
    }
    return err;
}

int sm_confine(struct sm_confinement *done)
{
    return confine(done, false, false);
}

int sm_confine_network(struct sm_confinement *done, bool files)
{
    return confine(done, true, files);
}
