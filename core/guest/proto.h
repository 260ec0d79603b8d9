/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wire between the guest's agent (PID 1) and the host, version 1.
 *
 * One byte stream: the guest dials vsock CID 2 port 1024 as soon as it can,
 * and dials again whenever the stream breaks (after a restore it always does).
 * Everything is little-endian. The stream is a sequence of frames:
 *
 *      0        4      5       6       8
 *     +--------+------+-------+-------+------------------------+
 *     | length | type | flags | chan  | payload, length bytes  |
 *     +--------+------+-------+-------+------------------------+
 *      u32      u8     u8      u16      0 … 65536
 *
 * Channel 0 is control. The host picks the channel (1 … 65535) of every
 * request it opens with EXEC, FILE_PUT or FILE_GET, and may use the number
 * again once the request is over: after FAILED, or after EXIT and the end of
 * the output streams (EXEC; with a terminal there is only STDOUT), FILE_INFO
 * (PUT), end of STDOUT (GET).
 *
 *   host                                  guest
 *    |  <------- HELLO version, marks ------|   once per connection, first
 *    |  -------- BOOT hostname, root … ---->|   once per boot
 *    |  <------- BOOTED marks | FAILED -----|
 *    |  -------- FILE_PUT 1, STDIN, EOF --->|   none of these waits for
 *    |  -------- EXEC 2 chain=1 ----------->|   an answer: a chained request
 *    |  -------- STDIN 2, STDIN_EOF 2 ----->|   starts when all it names
 *    |  <------- FILE_INFO 1 ---------------|   have succeeded, or FAILs with
 *    |  <------- STARTED 2 -----------------|   ECANCELED
 *    |  <------- STDOUT 2, STDERR 2, EOFs --|
 *    |  <------- EXIT 2 --------------------|   before or after the EOFs
 *    |  -------- FREEZE ------------------->|   before the machine is saved: the
 *    |  <------- FROZEN --------------------|   workload stands still …
 *    |  -------- THAW --------------------->|   … until here, in the source
 *    |  -------- RESUME clock, entropy … -->|   after a redial, to a copy of a
 *    |  <------- BOOTED | FAILED -----------|   machine: who it is from now on; what
 *    |                                      |   was frozen goes on after that
 *    |  -------- SHUTDOWN ----------------->|
 *    |  <------- GOODBYE reason, code ------|   nothing follows
 *    |  -------- BYE ---------------------->|   the guest turns itself off
 *
 * Requests (BOOT, RESUME, EXEC, FILE_*) are lists of fields, `tag u16 | length u32 |
 * value`; a request longer than one frame continues in frames of the same type
 * and channel, all but the last with FLAG_MORE, up to SM_REQUEST_MAX_BYTES.
 * An unknown field fails the request, and an unknown frame type is answered by
 * REFUSED: nothing is ignored.
 *
 * Flow control. Data (STDIN, STDOUT, STDERR) may only be sent against credit,
 * counted in payload bytes per channel and stream. STDIN starts with
 * SM_STDIN_WINDOW_BYTES; the output streams start with what EXEC's or
 * FILE_GET's WINDOW field says (default the same). CREDIT adds to it. So an
 * idle reader stops its own stream and nothing else: both sides always read
 * the connection, and never hold more than a window of one stream.
 *
 * Trust. The guest trusts the host, and only refuses what it cannot do. The
 * host trusts nothing: a frame that breaks any rule above ends the connection.
 */
#ifndef SM_GUEST_PROTO_H
#define SM_GUEST_PROTO_H

#define SM_PROTO_VERSION 2 /* 2: FREEZE, THAW */
#define SM_PROTO_VSOCK_PORT 1024
#define SM_FRAME_HEADER_BYTES 8
#define SM_FRAME_PAYLOAD_MAX 65536
/* What a sender best puts into a data frame: with its header it then fills one
 * vsock packet, not one and a tail of eight bytes. */
#define SM_FRAME_DATA_BYTES (65536 - SM_FRAME_HEADER_BYTES)
#define SM_STDIN_WINDOW_BYTES 262144
#define SM_REQUEST_MAX_BYTES (4u << 20)

/* Frame flags. */
#define SM_FLAG_MORE 0x01  /* a request goes on in the next frame */
#define SM_FLAG_EOF 0x02   /* STDOUT, STDERR: the stream ends after this */
#define SM_FLAG_GROUP 0x04 /* SIGNAL: the whole process group */

/* Host to guest. */
enum {
    SM_BOOT = 0x01,      /* c0: fields SM_BOOT_* */
    SM_EXEC = 0x02,      /* fields SM_EXEC_* */
    SM_STDIN = 0x03,     /* bytes for stdin, or for the file being put */
    SM_STDIN_EOF = 0x04, /* empty */
    SM_RESIZE = 0x05,    /* rows u16, columns u16 */
    SM_SIGNAL = 0x06,    /* signal u32 */
    SM_FILE_PUT = 0x07,  /* fields SM_FILE_* ; then STDIN …, STDIN_EOF */
    SM_FILE_GET = 0x08,  /* fields SM_FILE_* */
    SM_CREDIT = 0x09,    /* stream u32 (1 stdout, 2 stderr), bytes u32 */
    SM_CLOCK = 0x0a,     /* c0: CLOCK_REALTIME, ns u64 */
    SM_SHUTDOWN = 0x0b,  /* c0: reason u32 (SM_BYE_*), grace ms u32, signal u32 */
    SM_PING = 0x0c,      /* c0: up to 64 bytes, echoed by PONG */
    SM_BYE = 0x0d,       /* c0: GOODBYE was read */
    SM_RESUME = 0x0e,    /* c0: fields SM_BOOT_* but ROOT, MOUNT, FLAGS */
    SM_FREEZE = 0x0f,    /* c0: empty; FROZEN answers */
    SM_THAW = 0x10,      /* c0: empty */
};

/* Guest to host. */
enum {
    SM_HELLO = 0x81,        /* c0: fields SM_HELLO_* */
    SM_BOOTED = 0x82,       /* c0: fields SM_HELLO_MARK */
    SM_STARTED = 0x83,      /* pid u32 */
    SM_STDOUT = 0x84,       /* bytes of stdout, or of the file being got */
    SM_STDERR = 0x85,       /* bytes */
    SM_EXIT = 0x86,         /* struct below: sizes in SM_EXIT_BYTES */
    SM_FAILED = 0x87,       /* errno u32, stage u32 (SM_STAGE_*), text */
    SM_STDIN_CREDIT = 0x88, /* bytes u32: more may be sent on STDIN */
    SM_PONG = 0x89,         /* c0: the bytes of the PING */
    SM_GOODBYE = 0x8a,      /* c0: reason u32 (SM_BYE_*), code u32, text */
    SM_REFUSED = 0x8b,      /* type u8 that this agent does not know */
    SM_STDIN_CLOSED = 0x8c, /* empty: nobody will read stdin any more */
    SM_FILE_INFO = 0x8d,    /* size u64, mtime ns u64, mode u32, uid u32, gid u32 */
    SM_FROZEN = 0x8e,       /* c0: errno u32; 0: the workload stands still */
};

/*
 * EXIT: status u32 (wait status decoded: exit code, 0 if signalled),
 * signal u32, duration ns u64, peak resident bytes u64 (the largest of the
 * process and its awaited children), user ns u64, system ns u64.
 */
#define SM_EXIT_BYTES 40
#define SM_FILE_INFO_BYTES 28

enum {
    SM_HELLO_VERSION = 1,    /* u32 */
    SM_HELLO_GENERATION = 2, /* u32: 0 at boot, +1 for every redial */
    SM_HELLO_KERNEL = 3,     /* text: uname -r */
    SM_HELLO_MARK = 4,       /* id u32 (SM_MARK_*), value u64; repeated */
    SM_HELLO_BOOTED = 5,     /* u32: 1 when BOOT has been done already */
};

/* Marks: CLOCK_BOOTTIME in ns, which starts with the kernel's clock. */
enum {
    SM_MARK_KERNEL_ZERO = 0, /* CLOCK_REALTIME ns at which BOOTTIME was 0 */
    SM_MARK_TSC = 1,         /* the cycle counter at INIT, 0 if none */
    SM_MARK_INIT = 2,        /* the agent's first instruction, nearly */
    SM_MARK_MODULES = 3,     /* drivers loaded */
    SM_MARK_DIAL = 4,        /* connect begun */
    SM_MARK_HELLO = 5,       /* connected, HELLO queued */
    SM_MARK_BOOT = 6,        /* BOOT received */
    SM_MARK_ROOT = 7,        /* root file system mounted */
    SM_MARK_BOOTED = 8,      /* ready for EXEC */
};

enum {
    SM_BOOT_ROOT = 1,     /* u32 SM_ROOT_* (default AUTO) */
    SM_BOOT_HOSTNAME = 2, /* text */
    SM_BOOT_HOSTS = 3,    /* text: content of /etc/hosts */
    SM_BOOT_RESOLV = 4,   /* text: content of /etc/resolv.conf */
    SM_BOOT_CLOCK = 5,    /* ns u64: CLOCK_REALTIME */
    SM_BOOT_ENTROPY = 6,  /* bytes for the kernel's random pool */
    SM_BOOT_MOUNT = 7,    /* type NUL source NUL target NUL options; repeated;
                             source "serial:NAME" is a disk by its serial */
    SM_BOOT_GRACE = 8,    /* u32 ms between stop signal and SIGKILL */
    SM_BOOT_FLAGS = 9,    /* u32 SM_BOOTF_* */
    SM_BOOT_NET = 16,     /* mac[6], mtu u32 (0: leave), then address/prefix NUL
                             gateway NUL of IPv4, the same of IPv6; empty: none;
                             repeated, one a card */
    SM_BOOT_MACHINE_ID = 10, /* text, 32 hex digits: for /etc/machine-id */
};
#define SM_BOOTF_DISCARD 0x01 /* scratch is thrown away: do not write it back */
#define SM_BOOTF_ALL 0x01

enum {
    SM_ROOT_AUTO = 0,     /* overlay: upper on "scratch" if present, else tmpfs */
    SM_ROOT_SCRATCH = 1,  /* the same, but wait for "scratch" and insist */
    SM_ROOT_TMPFS = 2,    /* upper on tmpfs */
    SM_ROOT_READONLY = 3, /* no writes but to /run, /tmp, /dev/shm */
    SM_ROOT_INITRAMFS = 4 /* no root device: stay where we are */
};

enum {
    SM_EXEC_ARG = 1,     /* text, repeated, at least one */
    SM_EXEC_ENV = 2,     /* NAME=value, repeated */
    SM_EXEC_CWD = 3,     /* text; made when missing */
    SM_EXEC_USER = 4,    /* name|uid[:group|gid] */
    SM_EXEC_FLAGS = 5,   /* u32 SM_EXECF_* */
    SM_EXEC_SIZE = 6,    /* rows u16, columns u16 of the terminal */
    SM_EXEC_WINDOW = 7,  /* u32 stdout, u32 stderr: first credit, bytes */
    SM_EXEC_RLIMIT = 8,  /* resource u32, soft u64, hard u64; repeated */
    SM_EXEC_CHAIN = 9,   /* u16: a request to wait for; repeated */
    SM_EXEC_GROUP = 10,  /* u32: a supplementary gid; repeated */
    SM_EXEC_STOP = 11,   /* u32: signal that asks it to stop (default TERM) */
};
#define SM_EXECF_TTY 0x01   /* a terminal: stdin, stdout, stderr are one */
#define SM_EXECF_STDIN 0x02 /* STDIN will follow; else stdin is /dev/null */
#define SM_EXECF_MAIN 0x04  /* the machine ends when this ends */
/* No program: the agent itself writes what the root's writable layer holds to
 * stdout, as the tar of an image layer. ARG is a name for it and is not run. */
#define SM_EXECF_LAYER 0x08
#define SM_EXECF_ALL 0x0f

enum {
    SM_FILE_PATH = 1,   /* text, absolute */
    SM_FILE_MODE = 2,   /* u32: permission bits (put) */
    SM_FILE_UID = 3,    /* u32 (put) */
    SM_FILE_GID = 4,    /* u32 (put) */
    SM_FILE_FLAGS = 5,  /* u32 SM_FILEF_* */
    SM_FILE_WINDOW = 6, /* u32: first credit (get) */
    SM_FILE_CHAIN = 7,  /* u16: as SM_EXEC_CHAIN */
};
#define SM_FILEF_PARENTS 0x01 /* make missing folders, 0755 */
#define SM_FILEF_APPEND 0x02
#define SM_FILEF_EXCL 0x04 /* fail when it exists */
#define SM_FILEF_ALL 0x07

/* Where a request failed. */
enum {
    SM_STAGE_REQUEST = 0, /* the request itself makes no sense */
    SM_STAGE_CHAIN = 1,   /* what it waited for failed */
    SM_STAGE_SPAWN = 2,   /* pipes, terminal, fork, limits */
    SM_STAGE_USER = 3,    /* no such user or group, or may not become it */
    SM_STAGE_CWD = 4,
    SM_STAGE_EXEC = 5, /* execve: ENOENT is 127, the rest 126 */
    SM_STAGE_FILE = 6,
    SM_STAGE_ROOT = 7,    /* BOOT: root device, overlay */
    SM_STAGE_SCRATCH = 8, /* BOOT: the writable disk */
    SM_STAGE_MOUNT = 9,   /* BOOT: a mount asked for */
    SM_STAGE_NET = 10,    /* BOOT: a network card */
};

enum {
    SM_BYE_EXITED = 0,   /* the main command ended: code, 128+n if signalled */
    SM_BYE_POWEROFF = 1, /* asked from inside, or by SHUTDOWN */
    SM_BYE_REBOOT = 2,
    SM_BYE_FAILED = 3, /* the agent cannot go on: code is an errno, text says */
};

#endif
