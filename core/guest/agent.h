/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent: one thread, one epoll loop, one struct.
 *
 *   main.c     arguments, order of the early work, the loop
 *   link.c     the connection: dial, frames in, frames out
 *   chan.c     requests in flight: output streams, stdin, chains, the end
 *   exec.c     EXEC: pipes or terminal, fork; child.c: from fork to execve
 *   layer.c    the writable layer as a tar
 *   files.c    FILE_PUT and FILE_GET
 *   end.c      signals, reaping, the orderly end
 *   early.c    first mounts, modules; root.c: root device, overlay, switch
 *   setup.c    hostname, loopback, /etc files, clock, entropy
 *   freeze.c   the workload stands still while the machine is saved
 *   sockets.c  ends a copy's connections, which are its source's
 *   net.c      network cards; pipe.c: its program joining streams to ports
 *   frame.c request.c users.c   parsers, without state
 *
 * Functions return 0 or -errno. Only the forked child and main exit. In a test
 * (vm = false) nothing outside the agent's own children is touched: no mount,
 * no kill(-1), no reboot.
 */
#ifndef SM_GUEST_AGENT_H
#define SM_GUEST_AGENT_H

#include "proto.h"
#include "request.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct sm_agent;

/* A descriptor in an epoll set. fd -1: closed, and late events are dropped. */
struct sm_source {
    int fd;
    int set; /* the epoll descriptor it is in, or -1 */
    uint32_t events;
    void (*ready)(struct sm_agent *a, void *arg, uint32_t events);
    void *arg;
};

enum sm_chan_kind { SM_CHAN_EXEC, SM_CHAN_PUT, SM_CHAN_GET };

struct sm_stream {
    struct sm_source src;
    uint64_t credit;
    bool open; /* its end has not been told yet */
};

struct sm_chan {
    struct sm_chan *next; /* in the agent's list */
    uint16_t id;
    enum sm_chan_kind kind;
    bool waiting;  /* for its chain */
    bool detached; /* the connection it came by is gone */
    bool dead;     /* over; freed at the end of the turn */

    struct sm_exec_req exec;
    struct sm_file_req file;

    struct sm_source in; /* stdin's write end, or the file being put */
    struct sm_buf pending;
    uint32_t ungranted; /* bytes taken and not yet given back as credit */
    bool in_eof;        /* STDIN_EOF seen */
    bool in_closed;
    struct sm_stream out[2];

    pid_t pid; /* 0 before the fork */
    bool reaped, started, main;
    struct sm_source report; /* the child's word about its execve */
    int tty;                 /* terminal master for ioctl, or -1 */
    uint64_t start_ns;
    int put_error;
    bool put_created;
};

enum sm_end_phase {
    SM_END_NONE,
    SM_END_MAIN,  /* the main command was asked to stop */
    SM_END_ASKED, /* everything was sent SIGTERM */
    SM_END_KILL,  /* everything was sent SIGKILL */
    SM_END_FLUSH, /* no process left; output on its way to the host */
    SM_END_ACK,   /* GOODBYE sent */
};

struct sm_agent {
    bool vm;       /* PID 1 of a machine, not a test */
    bool own_ns;   /* PID 1 of its PID namespace: kill(-1) is ours */
    bool booted;   /* BOOT done */
    bool lower;    /* the read-only root is mounted */
    bool scratch;  /* the writable disk is mounted */
    bool discard;  /* … and its contents do not matter */
    bool end_asked; /* by the host's SHUTDOWN */
    int epoll;
    int streams;       /* epoll set of the output streams, inside `epoll` */
    bool streams_held; /* taken out of `epoll`: the out queue is full */
    int devnull, log;
    int old_root; /* the initramfs, to come back to at the end */
    struct sm_source link, signals, streams_src;
    struct sm_buf in, out, request;
    uint8_t request_type;
    uint16_t request_chan;
    uint32_t generation;
    struct sm_chan *chans;
    uint8_t used[8192], succeeded[8192]; /* one bit per channel number */
    uint64_t marks[16];

    /* The end of the machine. */
    enum sm_end_phase end;
    uint32_t bye_reason, bye_code, grace_ms;
    char bye_text[160];
    uint64_t end_deadline_ns;
    bool bye_read;
};

/* main.c */
uint64_t sm_now_ns(void);
void sm_log(struct sm_agent *a, const char *format, ...) __attribute__((format(printf, 2, 3)));
int sm_source_add(struct sm_agent *a, struct sm_source *s, int set, int fd, uint32_t events,
                  void (*ready)(struct sm_agent *, void *, uint32_t), void *arg);
void sm_source_close(struct sm_source *s);
/* Stop listening but keep the descriptor; sm_source_listen starts again. */
void sm_source_mute(struct sm_source *s);
int sm_source_listen(struct sm_source *s, int set, uint32_t events);

/* link.c */
int sm_link_dial(struct sm_agent *a, int *fd_out);
int sm_link_finish(int fd, int timeout_ms);
int sm_link_attach(struct sm_agent *a, int fd);
void sm_link_lost(struct sm_agent *a);
/* Queue a frame. Memory exhausted is the end of the connection. */
void sm_link_send(struct sm_agent *a, uint8_t type, uint8_t flags, uint16_t chan,
                  const void *payload, size_t len);
void sm_link_failed(struct sm_agent *a, uint16_t chan, int error, uint32_t stage,
                    const char *text);
int sm_link_flush(struct sm_agent *a);
bool sm_link_full(const struct sm_agent *a);

/* chan.c */
struct sm_chan *sm_chan_find(struct sm_agent *a, uint16_t id);
void sm_chan_open(struct sm_agent *a, enum sm_chan_kind kind, uint16_t id,
                  const uint8_t *data, size_t len);
void sm_chan_stdin(struct sm_agent *a, struct sm_chan *c, const uint8_t *data, size_t len);
void sm_chan_stdin_eof(struct sm_agent *a, struct sm_chan *c);
void sm_chan_credit(struct sm_agent *a, struct sm_chan *c, unsigned stream, uint32_t bytes);
int sm_chan_listen_out(struct sm_agent *a, struct sm_chan *c, unsigned stream, int fd,
                       uint32_t credit);
int sm_chan_listen_in(struct sm_agent *a, struct sm_chan *c, int fd);
/* Read what is left and announce the end of the streams (process reaped). */
void sm_chan_drain(struct sm_agent *a, struct sm_chan *c);
/* The request failed or is over: forget it. */
void sm_chan_fail(struct sm_agent *a, struct sm_chan *c, int error, uint32_t stage,
                  const char *text);
void sm_chan_finish(struct sm_agent *a, struct sm_chan *c);
void sm_chan_succeeded(struct sm_agent *a, struct sm_chan *c);
void sm_chan_run_chains(struct sm_agent *a);
void sm_chan_sweep(struct sm_agent *a);
void sm_chan_detach_all(struct sm_agent *a);

/* exec.c, child.c */
void sm_exec_start(struct sm_agent *a, struct sm_chan *c);
void sm_exec_report(struct sm_agent *a, struct sm_chan *c);
struct sm_child_fds {
    int in, out, err, tty, report;
};
void sm_child_run(struct sm_agent *a, struct sm_exec_req *r, const struct sm_child_fds *fds)
    __attribute__((noreturn));

/* layer.c: in the child. The upper folder as a tar on stdout; `folder` stands for
 * it in a test. */
int sm_layer_write(struct sm_agent *a, const char *folder);

/* files.c */
void sm_file_start(struct sm_agent *a, struct sm_chan *c);
void sm_file_write(struct sm_agent *a, struct sm_chan *c, const uint8_t *data, size_t len);
void sm_file_end(struct sm_agent *a, struct sm_chan *c);
void sm_file_pump(struct sm_agent *a, struct sm_chan *c);
bool sm_file_pump_all(struct sm_agent *a);
/* mkdir -p; the last component too when whole. Usable in the child. */
int sm_make_folders(const char *path, mode_t mode, bool whole);

/* end.c */
int sm_end_init(struct sm_agent *a);
void sm_end_begin(struct sm_agent *a, uint32_t reason, uint32_t code, uint32_t grace_ms,
                  uint32_t signal, const char *text);
void sm_end_step(struct sm_agent *a);
int sm_end_timeout_ms(const struct sm_agent *a);
void sm_reap(struct sm_agent *a);

/* freeze.c: only in a machine. Open what it needs, once the root is there. */
void sm_freeze_init(void);
/* Every process but this one stands still; -ETIMEDOUT: one would not, and none does. */
int sm_freeze(void);
void sm_thaw(void);
void sm_end_connections(void); /* sockets.c */

/* early.c, root.c, setup.c: only in a machine */
int sm_early_mounts(struct sm_agent *a);
int sm_early_modules(struct sm_agent *a);
/* Mount the read-only root if its device appears within timeout_ms. */
int sm_root_lower(struct sm_agent *a, int timeout_ms);
/* Everything between BOOT and a usable root; on failure *stage and *what. */
int sm_root_switch(struct sm_agent *a, const struct sm_boot_req *req, uint32_t *stage,
                   const char **what);
int sm_root_seal(void);
/* Back to the initramfs, disks written and unmounted. */
void sm_root_leave(struct sm_agent *a);
/* The device node of the disk with that serial. 0, -ENOENT, -ETIMEDOUT. */
int sm_disk_by_serial(const char *serial, int timeout_ms, char *out, size_t size);
void sm_setup_system(const struct sm_boot_req *req);
/* pipe.c: not the agent, but its program. The exit code. */
int sm_pipe_main(int argc, char **argv);
/* net.c */
int sm_setup_net(const struct sm_boot_req *req, const char **what);
void sm_setup_identity(const struct sm_boot_req *req);
int sm_setup_mounts(const struct sm_boot_req *req, const char **what);
void sm_setup_clock(uint64_t realtime_ns);
void sm_setup_entropy(const uint8_t *bytes, uint32_t len);
void sm_boot(struct sm_agent *a, const uint8_t *data, size_t len);
void sm_power(struct sm_agent *a) __attribute__((noreturn));

#endif
